# A bundle is copied, the service is started, and the host is in the mesh.
# shellcheck shell=bash disable=SC2154,SC2016

ok 'a control plane runs beside the machine' lab_start
ok 'it writes a bundle' bundle payments
settings
app

ok 'root copies the bundle to /etc/we-agent/payments' copy_bundle payments /etc/we-agent/payments
ok 'systemctl start returns when the workload is ready' inside 'systemctl start we-agent && active && ready' || return 9
ok 'systemctl status says so, too' inside 'p StatusText | grep -i ready'
ok 'the journal shows the identity' inside '
    journalctl -u we-agent SPIFFE_ID=spiffe://cluster.local/ns/vms/sa/payments --output=cat | grep "certificate in use.*serial="'
ok 'the journal shows the registration' inside 'logged "registered.*vms/payments-127.0.0.1"'
ok 'the journal shows the health' inside 'logged "the application is healthy"'
ok 'the journal has the workload in a field of its own' inside 'journalctl --quiet -u we-agent WORKLOAD=payments --output=cat | grep .'
ok 'the control plane has one entry, and its health' count 1 '"event":"health".*"healthy":true' "$out/events"
ok 'the token is root'"'"'s, and nobody else than the agent may read it' inside '
    token=/etc/we-agent/payments/istio-token
    test "$(stat -c %U $token)" = root && runuser -u we-agent -- cat $token >/dev/null && ! runuser -u nobody -- cat $token'
ok 'key, certificate and roots are the agent'"'"'s alone' inside '
    cd /run/we-agent/payments && test "$(stat -Lc "%U %a" key.pem cert-chain.pem root-cert.pem | sort -u)" = "we-agent 600"'
ok 'the certificate rotates' rotates
ok 'and the journal shows it' inside 'logged "renewed"'
ok 'we-agent status says it for people and programs' inside 'we-agent status | grep payments && we-agent status --json | grep -q "\"ready\": *true"'
ok 'nobody but root may ask' inside '! runuser -u nobody -- we-agent status'
ok 'no token and no key was ever logged' inside '
    journalctl --sync; token=$(cat /etc/we-agent/payments/istio-token)
    ! journalctl -u we-agent --output=cat | grep -F -e "${token:0:20}" -e "${token: -20}" -e "PRIVATE KEY"'
