#!/bin/sh
# After the files are there. The same for a first installation, an upgrade, and one that is undone.
set -ef
systemd-sysusers we-agent.conf
# An image has no /run to write to; the boot makes it then.
systemd-tmpfiles --create we-agent.conf || true
# Not a directory of the package: rpm would set its mode back at each upgrade.
[ -d /etc/we-agent ] || mkdir -m 0755 /etc/we-agent

# Whether this host allows it: on Debian an administrator may have a policy, which says 101 (invoke-rc.d(8)).
allowed() {
    ! command -v policy-rc.d >/dev/null || policy-rc.d we-agent.service "$1" || [ $? -ne 101 ]
}

# Whether socket and path units are others than before (preinstall.sh).
changed() {
    before=$(cat /run/we-agent.units 2>/dev/null || true)
    [ -n "$before" ] && [ "$before" != "$(cd /usr/lib/systemd/system && set +f && cksum we-agent*.path we-agent*.socket)" ]
}

if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    if allowed try-restart; then
        # What does not run is left so. The service's sockets and files stay meanwhile, so nobody is refused.
        restarted=we-agent.service
        if changed; then
            # A socket cannot be bound anew while the service has it: systemd does it while the service rests, which is named first.
            restarted="$restarted we-agent-socket@*.socket we-agent-exec.socket we-agent-permit.path we-agent-reload@*.path"
        fi
        # Not waited for: the service is ready when the control plane has answered, and an upgrade does not depend on that.
        systemctl --no-block try-restart $restarted || true
    fi
fi
