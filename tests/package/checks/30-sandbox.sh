# What the unit takes away, by its effect: the same attempts in a copy of the unit and as root without it. What succeeds in
# both shows nothing, and what is denied in both neither.
# shellcheck shell=bash disable=SC2154,SC2016

# The copy has every setting of the unit, but what is about starting, watching and keeping.
arrange '
    install -m 755 /root/attempts /usr/local/lib/attempts
    touch /tmp/seen; mkdir -p /home/somebody; echo secret >/home/somebody/file; mknod -m 666 /dev/probe c 1 3
    readlink /proc/self/ns/ipc >/run/ipc-namespace
    program="Type=oneshot\nExecStart=/bin/bash /usr/local/lib/attempts\n"
    systemctl cat we-agent.service |
        grep -vE "^(#|Exec|Type=|Restart|Watchdog|Sockets=|FileDescriptorStore|NotifyAccess|\[Install|WantedBy|Also)" |
        sed "s|^\[Service\]|&\n$program|" >/run/systemd/system/copy.service
    printf "[Service]\n$program" >/run/systemd/system/free.service
    systemctl daemon-reload'
ok 'the attempts can be made in a copy of the unit, and free' inside '
    systemctl start free && systemctl start copy && journalctl --sync
    for unit in copy free; do journalctl -u $unit --output=cat | grep -E "^(denied|allowed) " >/root/$unit; done
    # Each attempt was made in both; without any, nothing below would be a check.
    grep -c . /root/copy && diff <(sed "s/^[a-z]* //" /root/copy | sort) <(sed "s/^[a-z]* //" /root/free | sort)'
sandbox=$(inside 'join -1 2 -2 2 <(sort -k2 /root/copy) <(sort -k2 /root/free)')
while read -r what copy free; do
    case $what/$free in
        # It is the agent's to do.
        may-*) ok "the agent ${what//-/ }" test "$copy" = allowed ;;
        # An older one ignores the directive.
        share-memory-with-others/*) if systemd_is 248; then ok "not from within: ${what//-/ }" test "$copy/$free" = denied/allowed; fi ;;
        */allowed) ok "not from within: ${what//-/ }" test "$copy" = denied ;;
        *) skip "not from within: ${what//-/ }" 'this machine does not allow it at all' ;;
    esac
done <<<"$sandbox"
ok 'the running agent has no capability, no new privileges, and a filter' inside '
    cd /proc/$(p MainPID) && ! grep -E "^Cap(Inh|Prm|Eff|Bnd|Amb):" status | grep -v 0000000000000000 &&
        grep "^NoNewPrivs:.1" status && grep "^Seccomp:.2" status && test "$(stat -c %U .)" = we-agent'
ok 'no command of its unit is run outside of all that' inside '! systemctl cat we-agent | grep -E "^Exec[A-Za-z]*=[-:@]*[+!]"'
ok 'others do not reach the socket' inside '
    ! connects nobody /run/we-agent/payments/agent.sock && connects root /run/we-agent/payments/agent.sock'
ok 'nobody reads the state' inside '
    test "$(stat -c "%U %a" /var/lib/we-agent)" = "we-agent 700" && ! runuser -u nobody -- ls /var/lib/we-agent'
