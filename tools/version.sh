#!/bin/bash
# Prints the version of this tree: what git describes it as, counted from the
# last release; before the first release, and where there is no git, the newest
# heading of the changelog. With --package it is written as dpkg and rpm compare
# versions: what comes after a release is newer than it, what leads up to one, and
# what there was before the first, is older.
#
#     tools/version.sh [--package [VERSION]]
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1-}" = --package ]; then
	version=${2-$(tools/version.sh)}
	case $version in [0-9]*) ;; *) version=0-$version ;; esac
	# 1.2.0-rc.1-3-gabc-dirty: release, what it leads up to, what came after it.
	[[ $version =~ ^([0-9.]+)(-(.+))?$ ]] || { echo "version: $version is none" >&2; exit 1; }
	release=${BASH_REMATCH[1]} rest=${BASH_REMATCH[3]}
	dirty=
	if [[ $rest = dirty || $rest = *-dirty ]]; then dirty=dirty rest=${rest%dirty} rest=${rest%-}; fi
	after=
	if [[ $rest =~ ^((.*)-)?([0-9]+)-(g[0-9a-f]+)$ ]]; then rest=${BASH_REMATCH[2]} after=${BASH_REMATCH[3]}.${BASH_REMATCH[4]}; fi
	if [ -n "$dirty" ]; then after=${after:+$after.}$dirty; fi
	version=$release${rest:+\~${rest//-/.}}
	if [ -n "$after" ]; then
		case $version in *+*) version+=.$after ;; *) version+=+$after ;; esac
	fi
	echo "$version"
	exit
fi

newest=$(sed -n 's/^## *//p' CHANGELOG.md | sed 's/ .*//; q' | tr '[:upper:]' '[:lower:]')
if [ ! -e .git ] || ! commit=$(git describe --always --dirty 2>/dev/null); then
	echo "$newest" # also when git does not trust the owner of the tree
elif tag=$(git describe --tags --match 'v[0-9]*' --dirty 2>/dev/null); then
	echo "${tag#v}"
else
	echo "$newest+$commit"
fi
