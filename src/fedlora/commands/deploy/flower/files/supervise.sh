# Sourced by `start`: how processes are kept alive.
# shellcheck shell=bash disable=SC2154
. "$here/flower.sh"
umask 077
mkdir -p state/flwr logs

# keep NAME COMMAND ...: runs a command, and runs it again whenever it ends.
keep() {
    local name=$1 child='' code
    shift
    trap 'kill $child 2>/dev/null; wait; exit 0' TERM
    while true; do
        "$@" >>"logs/$name.log" 2>&1 &
        child=$!
        code=0
        wait "$child" || code=$?
        echo "start: $name has ended with code $code and is started again; its last words:" >&2
        tail -n 4 "logs/$name.log" | sed 's/^/    /' >&2
        sleep 5 &
        child=$!
        wait "$child" || true
    done
}

# stay: waits until this script is ended, and ends all that it began.
stay() {
    trap 'trap - EXIT; kill $(jobs -p) 2>/dev/null; wait' EXIT
    trap 'exit 0' INT TERM HUP
    while true; do wait; sleep 1; done
}
