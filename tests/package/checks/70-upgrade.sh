# Another version comes and goes, while certificates rotate and consumers are connected.
# shellcheck shell=bash disable=SC2154,SC2016

# The administrator's choice.
arrange 'chgrp we-agent /etc/we-agent; chmod 750 /etc/we-agent'
arrange consumers_start
for way in upgrade downgrade; do
    # The agent has asked for a certificate, and is stopped before it has one.
    ok 'the certificate rotates' rotates
    hung=$(events '"event":"csr".*hung')
    order inject ca-hangs
    ok 'the next one is asked for, and does not come' count $((hung + 1)) '"event":"csr".*hung' "$out/events"
    before=$(inside 'p MainPID')
    order heal ca-hangs
    ok "${way}s during a rotation" "$way"
    # The example of the next version is another one, and this host has a configuration: nobody may be asked.
    ok 'it is wholly installed, with the example of that version' inside "
        { rpm -q we-agent || dpkg -s we-agent | grep -x 'Status: install ok installed'; } &&
            { $([[ $way = upgrade ]] || echo !) grep -x '#next:' /usr/share/doc/we-agent/we-agent.yaml; }"
    ok 'the new program runs, and is ready' inside "
        within 20 another $before && within 20 ready && test \$(stat -Lc %i /proc/\$(p MainPID)/exe) = \$(stat -c %i /usr/bin/we-agent)"
    ok 'certificates rotate as before' rotates
    ok 'its files are as it brought them' verify
done
ok 'consumers of socket and files saw none of it' inside 'all_served 4'
ok 'the entry has kept its UID' kept_entry
ok 'it is still enabled, and configured as before' inside '
    test "$(systemctl is-enabled we-agent)" = enabled && grep -q "minInterval: 2s" /etc/we-agent/we-agent.yaml &&
        ! ls /etc/we-agent/*.rpmnew /etc/we-agent/*.dpkg-* 2>/dev/null | grep .'
ok 'who may enter its directory is as before' inside 'test "$(stat -c "%U:%G %a" /etc/we-agent)" = "root:we-agent 750"'
arrange 'printf "#!/bin/sh\nexit 101\n" >/usr/sbin/policy-rc.d && chmod 755 /usr/sbin/policy-rc.d'
before=$(inside 'p MainPID')
ok 'upgrades where a policy of the host forbids restarts' upgrade
ok 'and it was not restarted' inside "test \$(p MainPID) = $before && ready"
arrange 'rm /usr/sbin/policy-rc.d'
ok 'one that was stopped stays stopped' inside 'systemctl disable --now we-agent'
ok 'over a downgrade' downgrade
ok 'and is not enabled by it' inside 'test "$(systemctl is-active we-agent)/$(systemctl is-enabled we-agent)" = inactive/disabled'
arrange 'systemctl enable --now we-agent'
