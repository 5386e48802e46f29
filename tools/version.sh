#!/bin/bash
# Prints the version of this tree: what git describes it as, counted from the
# last release; before the first release, and where there is no git, the newest
# heading of the changelog.
set -euo pipefail
cd "$(dirname "$0")/.."

newest=$(sed -n 's/^## *//p' CHANGELOG.md | sed 's/ .*//; q' | tr '[:upper:]' '[:lower:]')
if [ ! -e .git ] || ! commit=$(git describe --always --dirty 2>/dev/null); then
	echo "$newest" # also when git does not trust the owner of the tree
elif tag=$(git describe --tags --match 'v[0-9]*' --dirty 2>/dev/null); then
	echo "${tag#v}"
else
	echo "$newest+$commit"
fi
