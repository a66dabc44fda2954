# What an administrator of Debian types. Sourced by life.sh.
# shellcheck shell=bash disable=SC2034,SC2154

install() { inside "apt-get install -y --no-install-recommends $package"; }
upgrade() { inside "apt-get install -y $next"; }
downgrade() { inside "apt-get install -y --allow-downgrades $package"; }
remove() { inside 'apt-get remove -y we-agent'; }
purge() { inside 'apt-get purge -y we-agent'; }
verify() { inside '! dpkg -V we-agent | grep .'; }
contents() { inside 'dpkg -L we-agent'; }
prepare() { :; }
