#!/usr/bin/env bash
# Cross-compiles the fuzz driver for AArch64 and runs it under qemu-user, NEON and scalar kernels.
# Skips, and says why, where the tools are not installed. Arguments go to the driver.
set -euo pipefail
cd "$(dirname "$0")/../.."
for tool in aarch64-linux-gnu-g++ qemu-aarch64 cmake; do
  if ! command -v "$tool" >/dev/null; then
    echo "skipped: $tool is not installed (Debian: g++-aarch64-linux-gnu qemu-user)"
    exit 0
  fi
done
cmake -S . -B build/neon -DCACHEGEN_DRIVER=ON -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ >/dev/null
cmake --build build/neon --parallel 2 --target cachegen_fuzz >/dev/null
qemu-aarch64 -L /usr/aarch64-linux-gnu ./build/neon/cachegen_fuzz "${1:-150}" "${2:-0}"
