#!/usr/bin/env bash
# A machine for tests: systemd as PID 1, booted in half a second by systemd-nspawn, and nothing of it left afterwards.
#
#   machine.sh up NAME ROOT           boot it and wait until systemd says that it is up
#   machine.sh in NAME COMMAND...     run as root inside; input, output and exit status are the command's
#   machine.sh beside NAME COMMAND... run a program of this host in the machine's network, outside of the machine
#   machine.sh push NAME FILE... DIR  copy into it
#   machine.sh limit NAME UNIT TREE   put the processes that a unit has now into a control group of this host's, and say where
#   machine.sh reboot NAME            reboot it: files stay, /run does not
#   machine.sh cut NAME               the same, but by pulling the plug
#   machine.sh down NAME [DIR]        power it off; its journal and console go to DIR
#   machine.sh able NAME              whether there can be one here, else says why not
#
# The root is an overlay, ROOT below and a tmpfs above, so that each machine begins clean. Its network is a namespace with
# nothing but loopback, and stays over a reboot. All of it lives in one pid namespace: the kernel ends the rest when the
# first process there is killed.
# shellcheck disable=SC2329 # some functions are called by way of "within"
set -euo pipefail

verb=${1:?see the head of this file} name=${2:?a name}
shift 2
state=${TMPDIR:-/tmp}/we-agent-machines/$name
lifetime=${MACHINE_LIFETIME:-1800} # seconds, then it is ended whoever has forgotten it

die() { echo "machine.sh: $name: $*" >&2; exit 125; }

# Whether anything of it lives: the keeper holds the lock.
alive() { [[ -e $state/lock ]] && ! flock --nonblock "$state/lock" true; }

# within SECONDS COMMAND...
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [[ $SECONDS -lt $end ]] || return 1
        sleep 0.05
    done
}

# One control group in each tree in which systemd keeps its units: the second one exists on hybrid hosts only.
groups() {
    local tree path mount
    while IFS=: read -r _ tree path; do
        mount=
        case $tree in
            '') mount=$(findmnt --first-only --noheadings --output TARGET --types cgroup2) ;;
            name=systemd) mount=$(findmnt --first-only --noheadings --output TARGET --types cgroup --options name=systemd) ;;
        esac
        [[ -z $mount ]] || echo "$mount${path%/}/we-agent-$name"
    done </proc/self/cgroup
}

# Where a control group can be that limits something: a machine has none of its own, as systemd there knows version 2 only, in
# which this host has neither memory nor tasks. So the limit is one of version 1.
limits() {
    local mount
    mount=$(findmnt --first-only --noheadings --output TARGET --types cgroup --options "$1") || return 1
    echo "$mount/we-agent-$name"
}

# The machine's PID 1, as its number is here. Another one after each boot.
leader() {
    local group pid
    while read -r group; do
        if read -r pid 2>/dev/null <"$group/payload/init.scope/cgroup.procs"; then echo "$pid"; return; fi
    done < <(cat "$state/groups" 2>/dev/null)
    return 1
}

# The processes of a unit of the machine, as their numbers are here.
processes() {
    local group
    while read -r group; do cat "$group/payload/system.slice/$1/cgroup.procs" 2>/dev/null || :; done <"$state/groups"
}

enter() {
    local pid
    pid=$(leader) || die "it does not run"
    nsenter --target "$pid" --all -- env -i HOME=/root LANG=C.UTF-8 TERM=dumb \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
}

# is_up [PID]: whether systemd says that it is up, as another PID 1 than that one.
is_up() {
    alive || die "it has ended; $(tail -5 "$state/console" 2>/dev/null)"
    local pid
    pid=$(leader) && [[ $pid != "${1:-}" ]] || return 1
    case $(enter timeout 5 systemctl is-system-running 2>/dev/null) in running | degraded) return 0 ;; esac
    return 1
}

# Whether there can be a machine, or why not: root of a container may not make one, for example.
able() {
    local uids group
    [[ $EUID = 0 ]] || { echo "a machine needs root"; return 1; }
    # shellcheck disable=SC1091
    [[ $(. /etc/os-release && echo "$ID") = debian ]] ||
        { echo "machines are made from this system's packages, and it is no Debian"; return 1; }
    read -r _ _ uids </proc/self/uid_map
    # Less than the whole range is a user namespace, in which no device may be made.
    if [[ $uids != 4294967295 ]] ||
        ! unshare --mount --net --pid --fork --mount-proc -- mount -t tmpfs tmpfs /run 2>/dev/null; then
        echo "a machine needs namespaces, which this root may not make"
        return 1
    fi
    while read -r group; do
        [[ -w ${group%/*} ]] || { echo "a machine needs a control group, which this root may not make"; return 1; }
    done < <(groups)
}

# ---- the keeper: watches over the machine from outside of its pid namespace

keeper() {
    exec 9>"$state/lock"
    flock 9
    echo $$ >"$state/keeper"
    local group
    groups >"$state/groups"
    while read -r group; do mkdir -p "$group"; done <"$state/groups"
    setpriv --pdeathsig KILL unshare --mount --net --pid --fork --kill-child --mount-proc -- "$0" _boot "$name" "$1" 9>&- &
    trap 'kill -KILL $!' TERM
    wait || :
    sweep
}

# Takes away the control groups, in which nothing is left.
sweep() {
    local group
    while read -r group; do
        [[ ! -d $group ]] || find "$group" -depth -type d -exec rmdir {} + || :
    done < <(cat "$state/groups" "$state/limits" 2>/dev/null)
}

# The first process of the pid namespace.
boot() {
    local root=$state/m/root group status
    mount -t tmpfs -o mode=755,size=4g tmpfs "$state/m"
    mkdir "$state"/m/{upper,work,root}
    mount -t overlay -o "lowerdir=$1,upperdir=$state/m/upper,workdir=$state/m/work" overlay "$root"
    # nspawn keeps locks in /run, and wants it on a tmpfs.
    mount -t tmpfs -o mode=755 tmpfs /run
    tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
    while read -r group; do echo 0 >"$group/cgroup.procs"; done <"$state/groups"
    # One control group tree of version 2, as every distribution has it, even where the host has the hybrid one; BPF for
    # IPAddressDeny= and DevicePolicy=; no system call filter around the ones that are tested; and the network is its own.
    export UNIFIED_CGROUP_HIERARCHY=1 SYSTEMD_SECCOMP=0
    while :; do
        rm -f "$state/again"
        status=0
        systemd-nspawn --quiet --boot --directory="$root" --machine="$name" --register=no --keep-unit --link-journal=no \
            --network-namespace-path=/proc/self/ns/net --resolv-conf=off --timezone=off --console=read-only \
            --capability=CAP_NET_ADMIN,CAP_BPF,CAP_PERFMON,CAP_SYS_RESOURCE,CAP_SYSLOG </dev/null || status=$?
        # 133 is a reboot.
        [[ $status = 133 || -e $state/again ]] || break
    done
    journalctl --directory="$root/var/log/journal" --no-pager --output=short-precise >"$state/journal" || :
}

# ---- the verbs

main() { # read whole before it runs, so that an edit does not disturb it
    local file mode before pid
    case $verb in
        up)
            able >&2 || die "cannot be"
            ! alive || die "it is up already"
            rm -rf --one-file-system "$state"
            mkdir -p "$state/m"
            setsid timeout "$lifetime" "$0" _keeper "$name" "$1" >"$state/console" 2>&1 </dev/null &
            within 5 alive || die "not started: $(cat "$state/console")"
            within 90 is_up || die "not up within 90 s: $(tail -20 "$state/console")"
            ;;
        in) enter "$@" ;;
        beside)
            pid=$(leader) || die "it does not run"
            exec nsenter --target "$pid" --net -- "$@"
            ;;
        push)
            for file in "${@:1:$#-1}"; do
                mode=$(stat -c %a "$file")
                enter install -m "$mode" /dev/stdin "${*: -1}/${file##*/}" <"$file"
            done
            ;;
        limit)
            group=$(limits "$2") || die "this host has no control groups of version 1 for $2"
            mkdir -p "$group"
            echo "$group" >>"$state/limits"
            processes "$1" | while read -r pid; do echo "$pid" >"$group/cgroup.procs"; done
            echo "$group"
            ;;
        reboot | cut)
            before=$(leader)
            if [[ $verb = reboot ]]; then enter systemctl reboot; else touch "$state/again" && kill -KILL "$before"; fi
            within 90 is_up "$before" || die "not up again within 90 s: $(tail -20 "$state/console")"
            ;;
        down)
            [[ -d $state ]] || die "there is no such machine"
            if pid=$(leader); then kill -s RTMIN+4 "$pid" || :; fi # systemd(1): power off
            ended() { ! alive; }
            if ! within 30 ended; then
                kill "$(cat "$state/keeper")" # still itself, for it holds the lock
                within 10 ended || die "it does not end"
            fi
            sweep # if its keeper was killed
            [[ -z ${1:-} ]] || { mkdir -p "$1" && cp "$state/console" "$state/journal" "$1/" || :; }
            rm -rf --one-file-system "$state"
            ;;
        able) able ;;
        _keeper) keeper "$@" ;;
        _boot) boot "$@" ;;
        *) die "no such verb: $verb" ;;
    esac
}
main "$@"; exit
