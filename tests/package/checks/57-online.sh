# Units that need an identity to start.
# shellcheck shell=bash disable=SC2154,SC2016

# Requires=: with Wants= it would start even if there was no identity in time.
arrange '
    printf "[Unit]\nRequires=we-agent-online.service\nAfter=we-agent-online.service\n[Service]\nExecStart=/bin/sleep infinity\n" \
        >/run/systemd/system/dependent.service
    systemctl daemon-reload; rotates; systemctl stop we-agent-online we-agent'
order inject down
ok 'a unit after we-agent-online.service starts with the certificate of before, while the control plane is away' inside '
    systemctl start --no-block dependent && within 6 systemctl --quiet is-active dependent && ! ready'
order heal down
arrange 'within 20 ready; systemctl stop dependent we-agent-online we-agent; rm -r /var/lib/we-agent/payments'
order inject down
ok 'without a certificate it waits' inside '
    waits() { test "$(systemctl is-active we-agent-online)/$(systemctl is-active dependent)" = activating/inactive; }
    systemctl start --no-block dependent && within 5 waits && sleep 2 && waits'
order heal down
ok 'and starts when there is one' inside 'within 30 systemctl --quiet is-active dependent && within 20 ready'
ok 'a restart of the agent does not disturb it' inside '
    before=$(systemctl show dependent --property=MainPID) && systemctl restart we-agent && within 20 ready &&
        test "$(systemctl show dependent --property=MainPID)" = "$before"'
arrange 'systemctl stop dependent we-agent-online; systemctl --quiet is-active we-agent'
