#!/usr/bin/env bash
# Starts or continues a run as the first process of a pod: in_pod.sh RUN COMMAND...
# Exit code 0 says that the run is complete, 75 that it was told to stop and is to be started again.
set -uo pipefail
run=$1 && shift
child='' stopping='' told=''

tell() { # once: a second signal would end the run unsaved
    if [ -n "$stopping" ] && [ -n "$child" ] && [ -z "$told" ]; then
        told=1
        kill -TERM "$child"
    fi
}
trap 'stopping=1; tell' TERM INT

# No process can make the folder before all have connected, so all find it or none does.
resume=()
if [ -f "$run/config.json" ]; then resume=(--resume); fi
# Kubernetes tells the first process alone, so the signal is handed on; a session of its own keeps others' away.
setsid "$@" --run="$run" "${resume[@]}" &
child=$!
tell
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # the signal has ended the wait, not the run
    wait "$child"
    code=$?
done
if [ "$code" -ne 0 ]; then exit "$code"; fi
for _ in {1..10}; do # process 0 has written it; a shared disk may show it later
    if [ -f "$run/evaluation.json" ]; then exit 0; fi
    sleep "${IN_POD_WAIT:-1}"
done
exit 75
