# Sourced by the launchers of several hosts: what a collective that never ends leaves behind, and when it is given up.
# engine.collective_timeout (seconds, a setting of the recipe) is the one time-out of all collectives.
export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}" # the flight recorder: last collectives of a rank
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}" # a rank that waits ends, with an error
