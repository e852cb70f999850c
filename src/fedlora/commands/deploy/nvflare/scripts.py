"""Holds the commands that start a site and the server."""

from __future__ import annotations

_PYTHON = """\
cd "$(dirname "${BASH_SOURCE[0]}")"

# The Python that has fedlora: that of the active environment, or FEDLORA_PYTHON=/path/to/python.
python="$(command -v "${FEDLORA_PYTHON:-python3}" || true)"
if [ -z "$python" ] || ! "$python" -c 'import fedlora, nvflare' 2>/dev/null; then
    echo "start: ${python:-${FEDLORA_PYTHON:-python3}} has no fedlora[nvflare]: activate the" \\
        "environment that has it, or set FEDLORA_PYTHON" >&2
    exit 2
fi
PATH="$(dirname "$python"):$PATH"   # the scripts of the kit call python3
export PATH
umask 077
"""

SITE = f"""\
#!/usr/bin/env bash
# Starts this site: the worker beside its rows, and the client that connects to the server.
# It stays in the foreground; Ctrl-C or SIGTERM ends both. Their output: worker.log, client.log.
set -uo pipefail
{_PYTHON}
"$python" -m fedlora worker --site site.yaml >>worker.log 2>&1 &
worker=$!
client=
watch=
end() {{
    trap - INT TERM EXIT
    kill -TERM $client $worker $watch 2>/dev/null
    wait
    exit "$1"
}}
trap 'end 0' INT TERM
trap 'end 1' EXIT
# On a busy machine FLARE's client gives up its login, and may then hang instead of ending.
end_hung() {{
    while sleep 10; do
        if tail -c +$(($2 + 1)) client.log | grep -q "Failed to login the client"; then
            sleep 20
            kill -KILL $1
            return
        fi
    done
}}
# The worker starts itself again when it crashes; the client is started again here. It ends with 0
# when an admin has shut the federation down.
while true; do
    touch client.log
    begun=$(wc -c <client.log)
    bash kit/startup/sub_start.sh --once >>client.log 2>&1 &
    client=$!
    end_hung $client $begun 2>/dev/null &
    watch=$!
    wait -n $client $worker
    code=$?
    kill $watch 2>/dev/null
    if ! kill -0 $worker 2>/dev/null; then
        echo "start: the worker has ended; its last words in worker.log:" >&2
        tail -n 3 worker.log >&2
        end 1
    fi
    [ $code = 0 ] && end 0
    echo "start: the client has ended with code $code; it is started again (client.log)" >&2
    sleep 5
done
"""

SERVER = f"""\
#!/usr/bin/env bash
# Starts the server of the federation. It stays in the foreground; Ctrl-C or SIGTERM ends it.
# Its output: server.log.
set -euo pipefail
{_PYTHON}
mkdir -p runs storage/jobs storage/snapshots
sed "s|@FOLDER@|$PWD|g" kit/local/resources.json.in > kit/local/resources.json
exec bash kit/startup/sub_start.sh --once >>server.log 2>&1
"""
