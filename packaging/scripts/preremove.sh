#!/bin/sh
# Debian says remove or upgrade, rpm how many versions will be left. An upgrade stops nothing.
set -e
case $1 in
remove | 0)
    if [ -d /run/systemd/system ]; then
        systemctl stop 'we-agent*.path' 'we-agent*.socket' 'we-agent*.service'
    fi
    # Also without a running systemd, as in the making of an image; of a template, all its instances.
    cd /usr/lib/systemd/system
    systemctl --no-reload --quiet disable we-agent* || true
    # A unit that is masked it passes over.
    rm -f /etc/systemd/system/*.wants/we-agent*
    ;;
esac
