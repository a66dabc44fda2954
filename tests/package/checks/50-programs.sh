# Programs of the host that are told of a new certificate, and commands that are run outside of the sandbox.
# shellcheck shell=bash disable=SC2154,SC2016

arrange '
    cat >/etc/systemd/system/server.service <<UNIT
[Unit]
After=we-agent.service
[Service]
ExecStartPre=/bin/sleep 1
ExecStart=/bin/sleep infinity
ExecReload=/bin/sh -c "openssl x509 -in /run/we-agent/payments/cert-chain.pem -noout -serial >>/root/reloads"
[Install]
WantedBy=multi-user.target
UNIT
    systemctl daemon-reload && systemctl enable --now server'
settings 'workloads: {payments: {socket: {allow: [{user: consumer}]}, hooks: [{unit: server.service}]}}'
ok 'a hook without the consent of the host is refused, and the refusal names it' inside '
    ! systemctl restart we-agent && test "$(p ExecMainStatus)" = 78 &&
        logged "systemctl enable --now we-agent-reload@server.service.path"'
ok 'with consent the service starts' inside 'systemctl enable --now we-agent-reload@server.service.path && systemctl start we-agent'
ok 'the unit is reloaded after a rotation, and sees the new certificate' inside '
    rotates && within 15 grep -q "$(serial)" /root/reloads'
ok 'we-agent status says that it was' inside 'within 15 eval "we-agent status --json | grep -q \"\\\"state\\\": *\\\"reloaded\\\"\""'
ok 'a reload that fails is told at once' inside '
    systemctl stop server && rotates && within 5 eval "we-agent status --json | grep -q \"the reload of server.service failed\""'
ok 'and when the unit runs it has the newest certificate' inside 'systemctl start server && within 20 newest'
# Each of many workloads may ask at once; what ended for good would never be heard again.
ok 'who asks forty times is answered at a pace' inside '
    reloads() { journalctl --quiet --unit=we-agent-reload@server.service.service --output=cat | grep -c ^Starting; }
    before=$(reloads) SECONDS=0
    for number in $(seq 40); do runuser -u we-agent -- sh -c "echo $((1000 + number)) >/run/we-agent/reload.d/server.service"; done
    within 20 test ! -e /run/we-agent/reload.d/server.service && journalctl --sync
    echo "# $(($(reloads) - before)) reloads in $SECONDS s"; test $(($(reloads) - before)) -le $((SECONDS + 2)) &&
        systemctl --quiet is-active we-agent-reload@server.service.path'
ok 'and whoever asks afterwards, too' inside 'rotates && within 15 newest'
ok 'no request is left behind' inside 'within 15 eval "! ls /run/we-agent/reload.d/* | grep -vE \"\\.(done|ended)\$\""'

# ---- PostgreSQL by the words of the README: a unit that it waits for gives it a copy. There is no PostgreSQL here, and daemon
# stands for its user.

arrange '
    printf "%s\n" "[Service]" "ExecStart=/bin/sleep infinity" \
        "ExecReload=/bin/sh -c \"openssl x509 -in /var/lib/postgresql/payments.pem -noout -serial >>/root/copies\"" \
        >/etc/systemd/system/postgresql@.service
    mkdir /var/lib/postgresql'
settings 'workloads: {payments: {socket: {allow: [{user: consumer}]}, files: {outputs: [{format: pem}, {format: combined}, {format: trust}]},
    hooks: [{unit: postgresql-svid.service}]}}'
ok 'what copies for PostgreSQL starts' eval 'readme ExecReload=.*postgresql@15 | sed "s/postgres -g postgres/daemon -g daemon/" | inside "
    cat >/etc/systemd/system/postgresql-svid.service && systemctl daemon-reload &&
    systemctl enable --now we-agent-reload@postgresql-svid.service.path && systemctl restart we-agent &&
    within 20 test -s /run/we-agent/payments/combined.pem && systemctl start postgresql@15-main postgresql-svid"'
ok 'it has the new certificate after each rotation' inside '
    rotates && within 15 grep -q "$(serial)" /root/copies && rotates && within 15 grep -q "$(serial)" /root/copies'
arrange '
    systemctl disable --now we-agent-reload@postgresql-svid.service.path
    systemctl stop postgresql-svid postgresql@15-main
    rm -r /etc/systemd/system/postgresql{@,-svid}.service /var/lib/postgresql
    systemctl daemon-reload'

# ---- commands

# What a command sees, and what it can do; where every user may write.
arrange '
    cat >/usr/local/bin/batch-probe <<"END"
#!/bin/sh
{
    echo "user $(id -un)"
    grep -o "we-agent[^/]*service" /proc/self/cgroup
    ls /etc/we-agent/. && echo bundles
    ls /var/lib/we-agent/. && echo keys
    we-agent status && echo status
    test -e /proc/1/status && echo processes
} >/var/tmp/batch-probe.new 2>&1 && mv /var/tmp/batch-probe.new /var/tmp/batch-probe
test -e /tmp/batch-is-well
END
    printf "#!/bin/sh\necho \"\$(id -un) \$(wc -c </run/we-agent/payments/cert-chain.pem)\" >>/var/tmp/hook\n" >/usr/local/bin/hook
    chmod 755 /usr/local/bin/batch-probe /usr/local/bin/hook; touch /tmp/batch-is-well'
# Nobody answers the agent for a while.
arrange 'systemctl mask --runtime --now we-agent-permit.path'
settings 'workloads:' '  batch: {health: {allowExec: true}, identity: {removeToken: true}}' \
    '  payments: {socket: {allow: [{user: consumer}]}, hooks: [{unit: server.service}, {command: [/usr/local/bin/hook]}]}'
arrange 'systemctl restart we-agent'
ok 'a bundle that comes while the agent runs is taken up' eval 'bundle batch && copy_bundle batch /etc/we-agent/batch readable && inside "
    within 20 test -s /run/we-agent/batch/key.pem"'
ok 'an exec probe is run, by a user of its own' inside 'within 15 grep -qx "user we-agent-exec" /var/tmp/batch-probe'
ok 'outside of the sandbox of the agent' inside 'grep -q "we-agent-exec@.*service" /var/tmp/batch-probe && grep -qx processes /var/tmp/batch-probe'
ok 'and sees neither bundles nor keys nor status' inside '! grep -xE "bundles|keys|status" /var/tmp/batch-probe'
ok 'its verdict reaches the mesh' count 1 '"entry":"vms/batch-.*"event":"health","healthy":true' "$out/events"
arrange 'rm /tmp/batch-is-well'
ok 'and the other one, too' count 1 '"entry":"vms/batch-.*"event":"health","healthy":false' "$out/events"
ok 'the command of a hook is run by that user' inside 'rotates && within 15 grep -q "^we-agent-exec" /var/tmp/hook'
ok 'nobody else may have a command run' inside '! connects nobody /run/we-agent-exec.sock && connects we-agent /run/we-agent-exec.sock'
ok 'and none is run as the user of the agent' inside '
    dir=/run/systemd/system/we-agent-exec@.service.d; mkdir $dir; printf "[Service]\nUser=we-agent\n" >$dir/user.conf; systemctl daemon-reload
    runuser -u we-agent -- perl -MIO::Socket::UNIX -e "my \$s = IO::Socket::UNIX->new(Peer => q(/run/we-agent-exec.sock)) or die;
        print \$s qq({\"command\":[\"true\"],\"deadline\":9000}\n); print scalar <\$s>" | tee /root/told
    rm -r $dir; systemctl daemon-reload; grep "not run as the user that asks" /root/told'
