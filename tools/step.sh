#!/usr/bin/env bash
# Run a command, say first what it does and afterwards how long it took:  bash tools/step.sh "what it does" command …
say=$1; shift
start=$(date +%s)
printf '\n==> %s\n' "$say"
"$@"; code=$?
spent=$(( $(date +%s) - start ))
if [ $code -eq 0 ]; then printf '==> done in %d min %02d s: %s\n' $((spent / 60)) $((spent % 60)) "$say"
else printf '==> FAILED with code %d after %d min %02d s: %s\n' $code $((spent / 60)) $((spent % 60)) "$say" >&2; fi
exit $code
