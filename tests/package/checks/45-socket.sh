# Who may have the identity, and a socket that systemd holds.
# shellcheck shell=bash disable=SC2154,SC2016

# settings TEXT: the rest of the configuration, after what every test needs.
settings() {
    printf '%s\n' 'startup: {readyTimeout: 5s}' 'defaults: {renewal: {minInterval: 2s}}' "$@" |
        inside 'cat >/etc/we-agent/we-agent.yaml && cp /etc/we-agent/we-agent.yaml /root/good.yaml'
}

inside '
    printf "u consumer -\nu stranger -\nm stranger consumer\n" | systemd-sysusers -
    mkdir -p /etc/systemd/system/we-agent-socket@.socket.d
    printf "[Socket]\nSocketGroup=consumer\nSocketMode=0660\n" >/etc/systemd/system/we-agent-socket@.socket.d/group.conf
    systemctl daemon-reload && systemctl stop we-agent'
settings 'workloads: {payments: {socket: {allow: [{user: consumer}]}}}'
ok 'a socket unit starts, and the agent takes its socket' inside '
    systemctl enable --now we-agent-socket@payments.socket && systemctl start we-agent && within 20 ready'
ok 'a user that is named is given the identity' inside 'given_to consumer'
ok 'a user that only reaches the socket is turned away, and the journal names it' inside '! given_to stranger && logged "stranger"'
inside consumers_start
ok 'over a stop and a start' inside 'systemctl stop we-agent && systemctl start we-agent && within 20 ready'
ok 'consumers of socket and files saw none of it' inside all_served
# The .rpm goes on with the socket unit, the .deb with the descriptor store.
if [[ $format = deb ]]; then
    ok 'without the socket unit the agent has a socket of its own again' inside '
        systemctl stop we-agent && systemctl disable --now we-agent-socket@payments.socket && systemctl start we-agent && within 20 ready'
fi
