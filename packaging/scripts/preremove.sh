#!/bin/sh
# Debian says remove or upgrade, rpm how many versions will be left. An upgrade stops nothing.
set -ef
# By name: units of others may begin like ours. Of a template, all its instances.
units='we-agent-permit.path we-agent-reload@*.path we-agent-exec.socket we-agent-socket@*.socket we-agent.service
    we-agent-exec@*.service we-agent-online.service we-agent-permit.service we-agent-reload@*.service'

# As in postinstall.sh.
allowed() {
    ! command -v policy-rc.d >/dev/null || policy-rc.d we-agent.service "$1" || [ $? -ne 101 ]
}

case $1 in
remove | 0)
    if [ -d /run/systemd/system ] && allowed stop; then
        systemctl stop $units
    fi
    # Also without a running systemd, as in the making of an image.
    systemctl --no-reload --quiet disable $(echo "$units" | tr -d '*') || true
    # A unit that is masked it passes over.
    for unit in $units; do
        find /etc/systemd/system -mindepth 2 -maxdepth 2 -path "*.wants/$unit" -delete
    done
    ;;
esac
