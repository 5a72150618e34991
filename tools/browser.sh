#!/usr/bin/env bash
# Install Debian's Chromium and pandoc, quietly; on failure show the end of what apt said.
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium pandoc; } >"$log" 2>&1 || { tail -n 5 "$log" >&2; exit 1; }
