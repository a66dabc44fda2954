# Units that need an identity to start.
# shellcheck shell=bash disable=SC2154,SC2016

arrange '
    printf "[Unit]\nRequires=we-agent-online.service\nAfter=we-agent-online.service\n[Service]\nExecStart=/bin/sleep infinity\n" \
        >/run/systemd/system/dependent.service
    systemctl daemon-reload; systemctl stop we-agent-online we-agent'
order inject down
arrange 'systemctl start --no-block dependent'
ok 'a unit after we-agent-online.service waits while the control plane is away' inside '
    within 15 active && test "$(systemctl is-active we-agent-online)/$(systemctl is-active dependent)" = activating/inactive'
order heal down
ok 'and starts when the workloads are ready' inside 'within 30 systemctl --quiet is-active dependent && ready'
ok 'a restart of the agent does not disturb it' inside '
    before=$(systemctl show dependent --property=MainPID); systemctl restart we-agent
    within 20 ready; test "$(systemctl show dependent --property=MainPID)" = "$before"'
arrange 'systemctl stop dependent we-agent-online; systemctl --quiet is-active we-agent'
