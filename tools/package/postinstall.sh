#!/bin/sh
# The user of the system's agents. Nothing is enabled or started: that is for each
# user and administrator to say.
set -e
if command -v systemd-sysusers >/dev/null; then systemd-sysusers p11-agent.conf; fi
if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
