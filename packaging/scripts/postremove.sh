#!/bin/sh
# Debian says remove, purge or upgrade, rpm how many versions are left.
set -e
case $1 in
remove | 0)
    rm -rf /run/we-agent /run/we-agent-sockets /run/we-agent.units
    rmdir --ignore-fail-on-non-empty /etc/we-agent || true
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload
    fi
    ;;
purge)
    # Bundles are configuration, and their tokens and the keys shall not stay behind.
    rm -rf /etc/we-agent /var/lib/we-agent
    ;;
esac
