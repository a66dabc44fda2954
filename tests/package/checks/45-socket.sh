# Who may have the identity, and a socket that systemd holds.
# shellcheck shell=bash disable=SC2154,SC2016

arrange '
    printf "u consumer -\nu stranger -\nm stranger consumer\n" | systemd-sysusers -
    mkdir -p /etc/systemd/system/we-agent-socket@.socket.d
    printf "[Socket]\nSocketGroup=consumer\nSocketMode=0660\n" >/etc/systemd/system/we-agent-socket@.socket.d/group.conf
    systemctl daemon-reload && systemctl stop we-agent'
# systemd gives the socket to the agent by its name, as root: who can swap that name has anything given to him.
ok 'while a socket unit makes its socket, the agent cannot swap it' inside '
    install -m 755 /root/swap /usr/local/bin/swap; touch /var/tmp/victim; chmod 600 /var/tmp/victim
    for turn in 1 2; do
        runuser -u we-agent -- /usr/local/bin/swap /var/tmp/victim /run/we-agent{/payments/agent.sock,-sockets/payments.sock} & swap=$!
        systemctl start we-agent-socket@payments.socket; kill $swap; wait $swap
        systemctl stop we-agent-socket@payments.socket
    done
    stat -c "%U:%G %a" /var/tmp/victim /run/we-agent-sockets
    test "$(stat -c "%U:%G %a" /var/tmp/victim)/$(stat -c "%U %a" /run/we-agent-sockets)" = "root:root 600/root 755"'
arrange 'rm -f /usr/local/bin/swap /var/tmp/victim /run/we-agent/payments/agent.sock*'
settings 'workloads: {payments: {socket: {allow: [{user: consumer}]}}}'
ok 'a socket unit starts, and the agent takes its socket' inside '
    systemctl enable --now we-agent-socket@payments.socket && systemctl start we-agent && within 20 ready'
ok 'a user that is named is given the identity' inside 'given_to consumer'
ok 'a user that only reaches the socket is turned away, and the journal names it' inside '! given_to stranger && logged "stranger"'
arrange consumers_start
ok 'over a stop and a start' inside 'systemctl stop we-agent && systemctl start we-agent && within 20 ready'
ok 'consumers of socket and files saw none of it' inside 'all_served 1'
# Each end of the agent has it started again, for somebody waits at the socket.
arrange 'echo "adminn: {}" >/etc/we-agent/we-agent.yaml; systemctl stop we-agent; consumers_start'
ok 'the socket outlives a wrong configuration, though a program waits at it' inside '
    socket() { systemctl show we-agent-socket@payments.socket --property="$1" --value; }
    logged "unknown key .adminn" && sleep 5 && echo "$(socket ActiveState) $(socket Result)" && test "$(socket Result)" = success &&
        { test "$(socket SubState)" = listening || test "$(socket SubState)" = running; }'
ok 'mended, the agent starts with the same socket' inside '
    cp /root/good.yaml /etc/we-agent/we-agent.yaml && within 10 systemctl start we-agent && within 20 ready &&
        test "$(stat -Lc "%G %a" /run/we-agent/payments/agent.sock)" = "consumer 660" && given_to consumer'
arrange 'systemctl stop consumer reader'
# What the unit leaves open is needed: closed, this fails. Settings of a drop-in win.
closed() {
    inside "
        dir=/run/systemd/system/we-agent.service.d; mkdir -p \$dir; printf '[Service]\n$1\n' >\$dir/closed.conf
        systemctl daemon-reload; systemctl restart we-agent; $2; status=\$?
        rm -r \$dir; systemctl daemon-reload; exit \$status"
}
if [[ $format = deb ]]; then
    ok 'with PrivateUsers=yes nobody that connects is known' closed 'PrivateUsers=yes' '! given_to consumer'
    ok 'with PrivateNetwork=yes there is no control plane' closed 'PrivateNetwork=yes' '! is_ready'
    ok 'with IPAddressDeny=any neither' closed 'IPAddressDeny=any' '! is_ready'
    ok 'with AF_UNIX alone neither' closed 'RestrictAddressFamilies=\nRestrictAddressFamilies=AF_UNIX' '! is_ready'
    ok 'as it is, all of that works' inside 'systemctl restart we-agent; within 20 is_ready && given_to consumer'
fi
# The .rpm goes on with the socket unit, the .deb with the descriptor store.
if [[ $format = deb ]]; then
    ok 'without the socket unit the agent has a socket of its own again' inside '
        systemctl stop we-agent && systemctl disable --now we-agent-socket@payments.socket && systemctl start we-agent && within 20 ready'
fi

# Where Istio's own agent has its socket, by the words of the README.
also=/run/secrets/workload-spiffe-uds/socket
belongs() { inside "test \"\$(stat -c '%U:%G %a' $1)\" = '$2'"; }
arrange 'printf "u istio-proxy -\n" | systemd-sysusers -'
settings "workloads: {payments: {socket: {allow: [{user: consumer}, {user: istio-proxy}], also: [/var$also]}}}"
ok 'a path where it may not write is told, with the directive that lets the service' inside '
    systemctl restart we-agent && logged "cannot create /run/secrets: (permission denied|read-only file system).*ReadWritePaths=" &&
        we-agent status --json | grep -q ReadWritePaths='
# ProtectSystem=strict makes /run read-only, but not in every machine: here a namespace of ProtectProc= or ProtectKernelTunables=
# may leave what is mounted below / as it was. So it is said of this directory again.
arrange '
    mkdir -p /run/systemd/system/we-agent.service.d
    printf "[Service]\nReadOnlyPaths=-/run/secrets\n" >/run/systemd/system/we-agent.service.d/strict.conf
    systemctl daemon-reload'
ok 'with the directory of the README alone that is not enough, and told as well' eval '
    readme tmpfiles.d | inside "cat >/root/also.sh && bash -e /root/also.sh && systemctl restart we-agent" &&
    inside "logged \"workload-spiffe-uds/socket.new: read-only file system.*ReadWritePaths=\""'
ok 'with the drop-in of the README it starts' eval 'readme service.d/also.conf | inside "
    mkdir -p /etc/systemd/system/we-agent.service.d && cat >/etc/systemd/system/we-agent.service.d/also.conf &&
    systemctl daemon-reload && systemctl restart we-agent"'
ok 'and the socket is there, for the group of the agent' inside "within 20 ready && within 20 test -S $also"
ok 'which is we-agent' belongs $also 'we-agent:we-agent 660'
settings "workloads: {payments: {socket: {group: istio-proxy, allow: [{user: consumer}, {user: istio-proxy}], also: [/var$also]}}}"
ok 'a group that comes later is applied at a restart' eval 'inside "systemctl restart we-agent && within 20 ready &&
    within 20 eval \"stat -c %G $also | grep -qx istio-proxy\"" && belongs $also "we-agent:istio-proxy 660"'
ok 'and its user is given the identity there' inside "given_to istio-proxy $also"
settings 'workloads: {payments: {socket: {allow: [{user: consumer}]}}}'
ok 'a path that is not configured any more goes at a restart' inside "systemctl restart we-agent && within 20 eval '! test -e $also'"
if [[ $format = deb ]]; then
    # Of the agent itself, and kept from the group: the .rpm has that of a unit.
    ok 'without the drop-in the socket has its own group again' eval 'inside "
        rm -r /etc/systemd/system/we-agent.service.d /etc/tmpfiles.d/workload-spiffe-uds.conf && systemctl daemon-reload &&
        chgrp consumer /run/we-agent/payments/agent.sock && systemctl restart we-agent && within 20 ready &&
        within 20 eval \"stat -c %G /run/we-agent/payments/agent.sock | grep -qx we-agent\""'
    ok 'and when somebody removes it, it is back within seconds' inside '
        socket=/run/we-agent/payments/agent.sock; rm $socket && within 20 connects root $socket && logged "removed or replaced"'
fi
arrange 'rm -rf /{etc,run}/systemd/system/we-agent.service.d /etc/tmpfiles.d/workload-spiffe-uds.conf
    systemctl daemon-reload && systemctl restart we-agent && within 20 ready'
