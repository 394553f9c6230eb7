# Sourced by the other scripts: makes .venv with the pinned packages once, and puts it on PATH.
# Usage: . launchers/install.sh     (set install_files=(FILE ...) before for other requirements than requirements.txt;
# no arguments: to a sourced script, "no arguments" means those of its caller)
_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_files=("${install_files[@]:-$_root/requirements.txt}")
_python="${PYTHON:-}"
for _candidate in python3.11 python3.12 python3.13 python3; do
  [ -n "$_python" ] && break
  command -v "$_candidate" >/dev/null 2>&1 && "$_candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && _python="$_candidate"
done
[ -n "$_python" ] || { echo "no Python 3.11 or newer found: install it, or name one with PYTHON=/path/to/python3.11" >&2; exit 2; }
command -v g++ >/dev/null 2>&1 || { echo "no g++ found: DeepSpeed and torch.compile build their parts with it; install it (apt-get install g++)" >&2; exit 2; }
_start=$SECONDS
# tests/requirements.txt holds requirements.txt too, so one stamp a file list is enough.
_stamp="$_root/.venv/.installed-$(cat "$_root/requirements.txt" "${_files[@]}" | sha256sum | cut -c1-16)"
# A .venv without pip is half made (Debian without python3-venv): it is made again. One that was finished is not asked.
if [ ! -f "$_stamp" ] || [ ! -x "$_root/.venv/bin/python" ]; then
  "$_root/.venv/bin/python" -m pip --version >/dev/null 2>&1 || "$_python" -m venv --clear "$_root/.venv" || { echo "could not make .venv: install python3-venv" >&2; exit 2; }
fi
export PATH="$_root/.venv/bin:$PATH" VIRTUAL_ENV="$_root/.venv"
export PYTHONPATH="$_root${PYTHONPATH:+:$PYTHONPATH}" # started from any directory: relative paths are the caller's
if [ ! -f "$_stamp" ]; then
  echo "Installing the pinned packages into .venv (several GB with PyTorch; once) ..."
  _log="$_root/.venv/install.log"
  _args=(); for _f in "${_files[@]}"; do _args+=(-r "$_f"); done
  if ! python -m pip install --disable-pip-version-check --progress-bar off "${_args[@]}" >"$_log" 2>&1; then
    tail -n 5 "$_log" >&2; echo "pip could not install the packages; the whole log is in .venv/install.log" >&2; exit 2
  fi
  touch "$_stamp"
fi
export MOE_CL_INSTALL_SECONDS=$((${MOE_CL_INSTALL_SECONDS:-0} + SECONDS - _start))
