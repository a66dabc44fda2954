# Programs of the host that are told of a new certificate, and run for the agent outside of its sandbox.
# shellcheck shell=bash disable=SC2154,SC2016

inside '
    cat >/etc/systemd/system/server.service <<UNIT
[Service]
ExecStart=/bin/sleep infinity
ExecReload=/bin/sh -c "openssl x509 -in /run/we-agent/payments/cert-chain.pem -noout -serial >>/root/reloads"
[Install]
WantedBy=multi-user.target
UNIT
    systemctl daemon-reload && systemctl enable --now server
    echo "workloads: {payments: {hooks: [{unit: server.service}]}}" >>/etc/we-agent/we-agent.yaml'
ok 'a hook without the consent of the host is refused, and the refusal names it' inside '
    ! systemctl restart we-agent && test "$(p ExecMainStatus)" = 78 &&
        logged "systemctl enable --now we-agent-reload@server.service.path"'
ok 'with consent the service starts' inside 'systemctl enable --now we-agent-reload@server.service.path && systemctl start we-agent'
ok 'the unit is reloaded after a rotation, and sees the new certificate' inside '
    rotates && within 15 grep -q "$(serial)" /root/reloads'
ok 'we-agent status says that it was' inside 'within 15 eval "we-agent status --json | grep -q \"\\\"state\\\": *\\\"reloaded\\\"\""'
ok 'no request is left behind' inside 'within 15 eval "! ls /run/we-agent/reload.d/* | grep -vE \"\\.(taken|done)\$\""'

if inside 'systemctl cat we-agent-exec.socket >/dev/null 2>&1'; then
    . "$here/checks/exec"
else
    skip 'exec probes and commands outside of the sandbox' 'the package has no we-agent-exec.socket'
fi
