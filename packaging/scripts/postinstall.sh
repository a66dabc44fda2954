#!/bin/sh
# After the files are there. The same for a first installation, an upgrade, and one that is undone.
set -e
systemd-sysusers we-agent.conf
# An image has no /run to write to; the boot makes it then.
systemd-tmpfiles --create we-agent.conf || true
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    # Does nothing unless it runs. Its sockets and files stay meanwhile, so nobody is refused. Not waited for: it is ready when
    # the control plane has answered, and an upgrade does not depend on that.
    systemctl --no-block try-restart we-agent.service || true
fi
