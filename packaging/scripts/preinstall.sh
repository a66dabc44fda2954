#!/bin/sh
# Before the files of this version are there: what postinstall.sh compares with. Nothing, at the first installation.
set -e
if [ -d /run/systemd/system ] && [ -e /usr/lib/systemd/system/we-agent.service ]; then
    (cd /usr/lib/systemd/system && cksum we-agent*.path we-agent*.socket) >/run/we-agent.units || true
fi
