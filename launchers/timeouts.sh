# Sourced by the launchers of several hosts: what a collective that never ends leaves behind, and when it is given up.
# engine.collective_timeout (seconds, a setting of the recipe) is the one time-out of all collectives.
# The flight recorder keeps the last collectives of a rank and writes them, at the time-out, to this name and the rank's
# number on the rank's own host. (TORCH_NCCL_TRACE_BUFFER_SIZE and ..._DEBUG_INFO_TEMP_FILE are PyTorch's older names.)
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}}"
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-/tmp/nccl_trace_$(id -un)_rank_}}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}" # a rank that waits ends, with an error
