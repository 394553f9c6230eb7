#!/usr/bin/env bash
# Everything the tests need, then the tests. Arguments go to pytest: bash launchers/test.sh tests/moe -k dispatch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
install_files=(tests/requirements.txt)
. launchers/install.sh
export DS_ACCELERATOR=cpu
exec python -m pytest "$@"
