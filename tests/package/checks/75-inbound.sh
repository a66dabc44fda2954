# The application is called through the inbound listener, whose socket systemd holds.
# shellcheck shell=bash disable=SC2154,SC2016

arrange '
    printf "[Socket]\nListenStream=127.0.0.1:8443\nService=we-agent.service\n" >/etc/systemd/system/we-agent-inbound.socket
    systemctl daemon-reload && systemctl stop we-agent'
settings 'workloads: {payments: {inbound: [{listen: "127.0.0.1:8443", forward: "127.0.0.1:8080"}]}}'
ok 'a socket unit starts, and the agent takes its port' inside '
    systemctl start we-agent-inbound.socket we-agent && within 20 ready && we-agent status | grep -q "inbound .*127.0.0.1:8443"'
arrange 'systemd-run --quiet --unit=caller --collect /root/caller 8443 /root/caller.summary'
ok 'restarts while it is called' inside '
    for turn in 1 2 3; do systemctl restart we-agent && within 20 ready || exit 1; done'
ok 'is killed while it is called' inside 'before=$(p MainPID); kill -9 "$before"; within 20 another "$before" && within 20 ready'
ok 'certificates rotate while it is called' rotates
# The version that is there has other sockets and paths.
arrange '
    cd /usr/lib/systemd/system && sed -i "s/^\[Socket\]/&\nBacklog=7/" we-agent-exec.socket we-agent-socket@.socket &&
        sed -i "s|^PathExists=.*|PathExists=/run/we-agent/other|" we-agent-permit.path && systemctl daemon-reload &&
        systemctl restart we-agent-exec.socket we-agent-permit.path && systemctl restart we-agent "we-agent-socket@*.socket" && within 20 ready'
for way in upgrade downgrade; do
    before=$(inside 'p MainPID')
    ok "${way}s while it is called" "$way"
    ok 'the new program is ready' inside "within 20 another $before && within 20 ready"
    [[ $way = upgrade ]] || continue
    ok 'and its sockets and paths are those of the new version' inside '
        ss -xlH | grep we-agent; ! ss -xlH | grep "we-agent.* 7 " && runuser -u we-agent -- touch /run/we-agent/permit &&
            within 10 test ! -e /run/we-agent/permit && ! systemctl --failed --plain --no-legend | grep .'
done
# A call that a killed process had taken is lost with it; nothing else is.
ok 'no call was refused, and at most the one of the kill broke off' inside '
    touch /root/caller.summary.stop; within 10 test -e /root/caller.summary; cat /root/caller.summary; grep -qE "^answered=[1-9][0-9]+ refused=0 broken=[01] " /root/caller.summary'
arrange 'systemctl stop we-agent we-agent-inbound.socket && rm /etc/systemd/system/we-agent-inbound.socket &&
    systemctl daemon-reload && systemctl start we-agent'
settings
