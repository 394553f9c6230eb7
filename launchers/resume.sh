# Sourced by the launchers before they start anything: a run that is there already is continued, a new out dir begins
# anew. The settings are those of the caller ("$@"); resume=false among them keeps an out dir with checkpoints refused.
case " $* " in *" resume="*) ;; *) set -- --resume "$@" ;; esac
