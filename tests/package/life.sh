#!/usr/bin/env bash
# life.sh SUITE deb|rpm PACKAGE NEXT: the life of the package on a real systemd, from the installation to the purge.
#
# Boots a machine of that Debian release, puts a miniature control plane beside it, and runs the files of checks/ one after
# the other; NEXT is the same package with a higher version. Each check prints a line; what a failed one said follows it, and
# the journal. Ends with "N passed, N failed, N skipped". $WE_LAB is the control plane's program; what is left to look at goes
# to $OUT.
# shellcheck disable=SC2329 # the checks, which are sourced, call the functions
set -uo pipefail

here=$(readlink -f "$(dirname "$0")")
suite=$1 format=$2 package=$(readlink -f "$3") next=$(readlink -f "$4")
readonly machine=$suite-$format-$$
out=${OUT:-${WE_AGENT_BED:-$here/../../target/bed}/out/$suite-$format}
rm -rf "$out"
mkdir -p "$out/lab"
out=$(readlink -f "$out")
passed=0 failed=0 skipped=0

machine() { local verb=$1; shift; "$here/machine.sh" "$verb" "$machine" "$@"; }
# inside SCRIPT: a shell script inside, with the words that the checks use.
inside() { timeout -k 5 180 "$here/machine.sh" in "$machine" bash -c ". /root/words; $1"; }
# arrange SCRIPT: the same for what is no check.
arrange() { inside "$1" >>"$out/arranged" 2>&1; }

# ok WHAT COMMAND...: one check; lines of it that begin with # are shown. "|| return 9" where nothing that follows can be seen without it.
ok() {
    local what=$1 started=$SECONDS status=0
    shift
    "$@" >"$out/last" 2>&1 </dev/null || status=$?
    if [[ $status = 0 ]]; then
        passed=$((passed + 1))
        printf 'ok      %-11s %s (%d s)\n' "$suite/$format" "$what" $((SECONDS - started))
        sed -n 's/^# /          /p' "$out/last"
    else
        failed=$((failed + 1))
        printf 'NOT OK  %-11s %s (%d s, status %d)\n' "$suite/$format" "$what" $((SECONDS - started)) "$status"
        {
            tail -25 "$out/last"
            echo 'the journal:'
            inside 'journalctl --no-pager --output=short-precise --lines=25' 2>&1 </dev/null
        } | sed 's/^/          /'
    fi
    return "$status"
}

# skip WHAT REASON
skip() {
    skipped=$((skipped + 1))
    printf 'skipped %-11s %s: %s\n' "$suite/$format" "$1" "$2"
}

# Whether this systemd is at least of a version; what older ones do not know they ignore.
systemd_is() { [[ $systemd -ge $1 ]]; }

# ---- the control plane, a program of this host in the machine's network

lab_start() {
    [[ -p $out/orders ]] || mkfifo "$out/orders"
    # Not by the function: the number that is kept must be the program's.
    "$here/machine.sh" beside "$machine" "$WE_LAB" serve --dir "$out/lab" --listen 127.0.0.1:15012 --ttl 16s --grace 90s \
        --group-file "$here/groups/payments.yaml" --group-file "$here/groups/batch.yaml" \
        --group-file "$here/groups/vault.yaml" --group-file "$here/groups/sealed.yaml" \
        --service pay.example.com:80:8080:app=payments <>"$out/orders" >>"$out/events" 2>&1 &
    lab=$!
    count 1 '"address"' "$out/events"
}
# order WORDS: inject or heal a fault.
order() { echo "$*" >"$out/orders"; }
# bundle GROUP: a bundle for it, as the mesh's administrator has it.
bundle() {
    rm -rf "$out/bundle/$1"
    "$WE_LAB" bundle --dir "$out/lab" --group-file "$here/groups/$1.yaml" --internalIP 127.0.0.1 --output "$out/bundle/$1"
}
# copy_bundle GROUP DIR [readable]: copies it as root does it, token 0600 and all; or so that everybody can read it at once.
copy_bundle() {
    { if [[ ${3:-} ]]; then chmod 755 "$out/bundle/$1"; else chmod 600 "$out/bundle/$1/istio-token"; fi; } &&
        tar -C "$out/bundle/$1" --owner=0 --group=0 -c . | inside "mkdir -p '$2' && tar -C '$2' -xp"
}
# events PATTERN: how many of its events say so.
events() { grep -cE "$1" "$out/events"; }
# count N PATTERN FILE: waits until N lines of the file say so.
count() {
    local end=$((SECONDS + 30))
    until [[ $(grep -cE "$2" "$3") -ge $1 ]]; do
        [[ $SECONDS -lt $end ]] || { echo "not $1 times '$2' in 30 s:"; tail -5 "$3"; return 1; }
        sleep 0.1
    done
}
# kept_entry: it has made one entry of payments only and deleted none, so the UID is the first one's.
kept_entry() {
    test "$(events '"entry":"vms/payments-.*"event":"entry_created"')" = 1 &&
        test "$(events '"entry":"vms/payments-.*"event":"entry_deleted"')" = 0
}
# rotates: waits until one more certificate has been signed, and is in use.
rotates() { inside 'rotates'; }

# The application of the workload: what the health probe asks. It is no part of the machine, so each boot begins without.
app() {
    arrange 'mkdir -p /srv/app && echo ok >/srv/app/healthz &&
        systemd-run --quiet --unit=app busybox httpd -f -p 127.0.0.1:8080 -h /srv/app'
}

# settings LINE...: writes the configuration; every check has renewals after seconds, and a boot that does not wait a minute
# for a control plane that is away.
settings() {
    printf '%s\n' 'startup: {readyTimeout: 5s}' 'defaults: {renewal: {minInterval: 2s}}' "$@" |
        inside 'cat >/etc/we-agent/we-agent.yaml && cp /etc/we-agent/we-agent.yaml /root/good.yaml'
}

# readme WORD: the example that has it.
readme() {
    awk -v word="$1" '/^```/ { if (open && text ~ word) printf "%s", text; open = !open; text = ""; next }
        open { text = text $0 "\n" }' "$here/../../README.md"
}

# ---- the machine

cleanup() {
    [[ -z ${lab:-} ]] || kill "$lab" 2>/dev/null
    "$here/machine.sh" down "$machine" "$out" 2>/dev/null
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

main() { # read whole before it runs, so that an edit does not disturb it
    local root file
    if ! { root=$("$here/root.sh" "$suite") && machine up "$root"; }; then
        echo "NOT OK  $suite/$format no machine"
        exit 1
    fi
    machine push "$here"/inside/* "$package" "$next" /root
    package=/root/${package##*/} next=/root/${next##*/}
    systemd=$(inside 'systemctl --version' | sed -n '1s/systemd \([0-9]*\).*/\1/p')
    echo "# $suite: systemd $systemd, $format"
    for file in "$here/$format.sh" "$here"/checks/*.sh; do
        # shellcheck disable=SC1090
        . "$file"
        [[ $? != 9 ]] || break
    done
    rm -f "$out/orders" "$out/last"
    echo "$passed passed, $failed failed, $skipped skipped"
    [[ $failed = 0 ]]
}
main; exit
