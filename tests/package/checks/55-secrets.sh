# Tokens and bundles: who can read them, where else they can come from, and how long they stay.
# shellcheck shell=bash disable=SC2154,SC2016

ok 'a token that has served stays while root does not answer, which is told' inside '
    within 20 eval "we-agent status --json | grep -q \"root was asked to remove it\"" && test -e /etc/we-agent/batch/istio-token'
arrange 'systemctl unmask --runtime we-agent-permit.path && systemctl start we-agent-permit.path'
ok 'a token is removed when it has served, where that is configured' inside '
    within 20 eval "! test -e /etc/we-agent/batch/istio-token" && test -e /etc/we-agent/payments/istio-token'
ok 'by root, and both say so' inside '
    within 20 eval "we-agent status --json | grep -q \"\\\"state\\\": *\\\"removed\\\"\"" &&
        journalctl --quiet --unit=we-agent-permit --output=cat | grep "the token of batch has served and was removed"'
ok 'the agent itself can change nothing there' inside '
    test "$(stat -c "%U:%G %a" /etc/we-agent/batch)" = "root:we-agent 750"
    ! runuser -u we-agent -- sh -c "mv /etc/we-agent/batch/root-cert.pem /etc/we-agent/batch/other || echo x >/etc/we-agent/batch/root-cert.pem"'
ok 'nor have root do it, where that is not configured' inside '
    token=/etc/we-agent/payments/istio-token
    printf "{\"inode\":%d,\"size\":%d,\"written\":[%d,%d],\"changed\":[0,0]}" $(stat -c "%i %s %Y" $token) $((10#$(date -r $token +%N))) |
        runuser -u we-agent -- tee /run/we-agent/remove.d/payments && runuser -u we-agent -- touch /run/we-agent/permit
    told() { journalctl --quiet --unit=we-agent-permit --output=cat | grep "the token of payments stays"; }
    within 20 told && test -e $token && rm /run/we-agent/remove.d/payments'
ok 'a request that cannot be taken away is no storm, and not the end' inside '
    answers() { journalctl --quiet --unit=we-agent-permit --output=cat | grep -c ^Starting; }
    runuser -u we-agent -- mkdir -p /run/we-agent/permit/x; before=$(answers) SECONDS=0; sleep 3
    echo "# $(($(answers) - before)) answers in $SECONDS s"; test $(($(answers) - before)) -le $((SECONDS + 1)) &&
        rm -r /run/we-agent/permit && within 5 systemctl --quiet is-active we-agent-permit.path'
ok 'and the workload goes on without' inside 'within 20 eval "we-agent status --json | grep -c \"\\\"registered\\\"\" | grep -qx 2"'

# credentials DIRECTIVE DIR PREFIX: one line for each file of a bundle.
credentials() {
    local file
    echo '[Service]'
    for file in cluster.env mesh.yaml root-cert.pem istio-token hosts; do echo "$1=$3_$file:$2/$file"; done
}
for name in vault sealed; do
    bundle "$name" && copy_bundle "$name" "/root/$name"
done
arrange 'mkdir -p /etc/systemd/system/we-agent.service.d'
credentials LoadCredential /root/vault vault | inside 'cat >/etc/systemd/system/we-agent.service.d/vault.conf'
if systemd_is 250; then
    arrange 'mkdir /root/encrypted && for file in /root/sealed/*; do
        systemd-creds encrypt --with-key=host --name=sealed_${file##*/} $file /root/encrypted/${file##*/} || exit 1
    done; rm -r /root/sealed'
    credentials LoadCredentialEncrypted /root/encrypted sealed | inside 'cat >/etc/systemd/system/we-agent.service.d/sealed.conf'
fi
arrange 'systemctl daemon-reload && systemctl restart we-agent'
ok 'a bundle can come as credentials of the service' inside 'within 20 test -s /run/we-agent/vault/key.pem'
if systemd_is 250; then
    ok 'and sealed for this host by systemd-creds' inside 'within 20 test -s /run/we-agent/sealed/key.pem'
else
    skip 'sealed credentials' "systemd $systemd has no systemd-creds"
fi
ok 'no token was ever logged' inside '
    journalctl --sync
    for token in /root/vault/istio-token /etc/we-agent/payments/istio-token; do
        token=$(cat $token); journalctl --output=cat | grep -F -e "${token:0:20}" -e "${token: -20}" && exit 1
    done; exit 0'
arrange 'rm -r /etc/systemd/system/we-agent.service.d; systemctl daemon-reload; systemctl restart we-agent; within 20 ready'
