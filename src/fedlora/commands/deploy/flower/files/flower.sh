# Sourced by the scripts of this folder: where the programs are, and Flower's settings.
# shellcheck shell=bash disable=SC2154

# The Python that has fedlora: that of the active environment, or FEDLORA_PYTHON=/path/to/python.
python="$(command -v "${FEDLORA_PYTHON:-python3}" || true)"
if [ -z "$python" ] || ! "$python" -c 'import fedlora, flwr' 2>/dev/null; then
    echo "start: ${python:-${FEDLORA_PYTHON:-python3}} has no fedlora[flower]: activate the" \
        "environment that has it, or set FEDLORA_PYTHON" >&2
    exit 2
fi
export PATH="$(dirname "$python"):$PATH:/usr/sbin"
export FLWR_HOME="$here/state/flwr"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
