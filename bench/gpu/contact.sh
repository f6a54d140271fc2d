#!/usr/bin/env bash
# One of the three calls on a GPU box that has no network: docs/gpu.md says what each one decides.
#
#   bench/gpu/contact.sh 1|2|3 [--limit SECONDS] [--dry-run]
#
# Everything that a call finds is in one archive, $OUT/call<N>.tgz, which is renewed while it runs.
# --dry-run does on a host without a GPU what such a host can do of each stage.
# PYTHON overrides the interpreter, TESTS narrows the tests as pytest's -k does.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" -u -m bench.gpu.contact "$@"
