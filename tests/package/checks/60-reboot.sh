# The machine boots, with and without a control plane.
# shellcheck shell=bash disable=SC2154,SC2016

# A boot on a busy host may take longer than a certificate of the lab lives: the other workload has a token for that.
spare() { bundle batch && copy_bundle batch /etc/we-agent/batch; }
spare
# Nothing but the certificate that was kept: after a boot there is no token any more.
ok 'is enabled' inside 'systemctl enable we-agent && rm /etc/we-agent/payments/istio-token'
ok 'the machine reboots' machine reboot
app
ok 'the agent is up, and ready' inside 'within 20 active && within 20 ready'
ok 'a program that starts after it is reloaded when it runs' inside '
    within 20 newest && ! journalctl --boot --unit=we-agent --output=cat | grep "not in use" && ! systemctl --failed --plain --no-legend | grep .'
ok 'its programs have their files again' inside 'test -s /run/we-agent/payments/key.pem'
ok 'the entry has kept its UID' kept_entry
ok 'the journal of the boot before ends in a clean stop' inside 'journalctl -b -1 -u we-agent --output=cat | grep -q "^stopped"'

ok 'the machine loses its power' machine cut
app
ok 'the agent is up, and ready' inside 'within 20 active && within 20 ready'
ok 'the entry has kept its UID' kept_entry

# The certificate outlives the boot, which takes half of its life: the wait for the control plane alone is 5 s.
ok 'the certificate rotates' rotates
spare
down=$(events '"injected":"down"')
order inject down
ok 'the control plane goes' count $((down + 1)) '"injected":"down"' "$out/events"
ok 'the machine reboots without it' machine reboot
app
# A minute and more would be too much; READY comes after 5 s here (readyTimeout).
ok 'the boot was not held up' inside '
    at() { systemctl show --property="$1TimestampMonotonic" --value; }
    took=$((($(at Finish) - $(at Userspace)) / 1000)); echo "# $took ms"; systemctl --failed --plain --no-legend
    within 20 active && test "$took" -gt 0 && test "$took" -lt 40000 && test "$(systemctl is-system-running)" = running'
ok 'its programs have the certificate of before' inside '
    openssl x509 -in /run/we-agent/payments/cert-chain.pem -noout -checkend 0 &&
        test "$(openssl x509 -in /run/we-agent/payments/cert-chain.pem -noout -pubkey)" = "$(openssl pkey -in /run/we-agent/payments/key.pem -pubout)"'
ok 'and the journal says what is missing' inside 'logged "15012"'
order heal down
ok 'it comes back, and the agent is ready' inside 'within 60 ready'
ok 'the entry has kept its UID' kept_entry
