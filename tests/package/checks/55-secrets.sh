# Tokens and bundles: who can read them, where else they can come from, and how long they stay.
# shellcheck shell=bash disable=SC2154,SC2016

# It served before root had let the agent remove it.
ok 'a token is removed when it has served, where that is configured' inside '
    within 45 eval "! test -e /etc/we-agent/batch/istio-token" && test -e /etc/we-agent/payments/istio-token'
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
