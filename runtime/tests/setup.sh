#!/usr/bin/env bash
# Fetches what the tests of runtime/ need beside Python's packages: Debian's packages, and the headers of three SDKs.
#
#   setup.sh PYTHON DIRECTORY    the headers go to DIRECTORY/{onnxruntime,tensorrt,cuda}/include
#
# What cannot be had is named in one line with the command to type, and the tests that need it are skipped with that reason.
set -euo pipefail
python=$1 sdk=$2
here=$(cd "$(dirname "$0")" && pwd)

# onnxruntime_c_api.h of API 29 is in no package of PyPI or Debian; this one of npm (MIT) has it.
ort_package=com.github.asus4.onnxruntime@0.4.9
ort_sha256=e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d
ort_headers='package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64_x86_64-simulator/onnxruntime.framework/Headers'

debian=(g++ nlohmann-json3-dev zlib1g-dev libgtest-dev libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc
  pkg-config clang libclang-rt-dev)
command -v npm >/dev/null || debian+=(npm)

# Another version of ONNX Runtime than the one under test, for one binary on both; any of its x86-64 wheels has the library.
older=1.20.1
older_sha256=5eec64c0269dcdb8d9a9a53dc4d64f87b9e0c19801d9321246a53b7eb5a7d1bc

# What is missing, and what to type; the rest of the set-up goes on.
lacks() {
  echo "tests of runtime/ are skipped: $1"
}

install_debian() {
  command -v dpkg >/dev/null && dpkg -s "${debian[@]}" >/dev/null 2>&1 && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -q >/dev/null &&
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${debian[@]}" >/dev/null; then
    return
  fi
  lacks "they need Debian's packages; to install them: sudo apt-get install ${debian[*]}"
}

fetch_onnxruntime() {
  [ -e "$sdk/onnxruntime/include/onnxruntime_c_api.h" ] && return
  if ! command -v npm >/dev/null || ! (cd "$work" && npm pack --silent "$ort_package" >/dev/null); then
    lacks "they need ONNX Runtime's headers, which npm fetches; install npm, look at the network, then make setup again"
    return
  fi
  echo "$ort_sha256  $(echo "$work"/*.tgz)" | sha256sum --check --quiet
  mkdir -p "$sdk/onnxruntime/include"
  tar -xzf "$work"/*.tgz -C "$sdk/onnxruntime/include" --strip-components=7 "$ort_headers"
}

fetch_older_onnxruntime() {
  [ -e "$sdk/older/libonnxruntime.so" ] || [ "$(uname -m)" != x86_64 ] && return
  if ! "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp --python-version 311 \
    --platform manylinux_2_27_x86_64 "onnxruntime==$older" -d "$work/older"; then
    lacks "onnxruntime $older is not to be had here"
    return
  fi
  echo "$older_sha256  $(echo "$work"/older/*.whl)" | sha256sum --check --quiet
  "$python" -m zipfile -e "$work"/older/*.whl "$work/older"
  mkdir -p "$sdk/older"
  cp "$work/older/onnxruntime/capi/libonnxruntime.so.$older" "$sdk/older/libonnxruntime.so"
}

fetch_nvidia() {
  [ -e "$sdk/cuda/include/crt" ] && return
  if ! "$python" -m pip download -q --disable-pip-version-check --no-deps --require-hashes -r "$here/sdks.txt" -d "$work"; then
    lacks "the headers of TensorRT and CUDA are not to be had here"
    return
  fi
  for wheel in "$work"/*.whl; do "$python" -m zipfile -e "$wheel" "$work/wheels"; done
  mkdir -p "$sdk/tensorrt/include" "$sdk/cuda"
  cp "$work"/wheels/kernel_lens/include/tensorrt/*.h "$sdk/tensorrt/include/"
  cp -r "$work"/wheels/nvidia/cu13/include "$sdk/cuda/"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
install_debian
fetch_onnxruntime
fetch_older_onnxruntime
fetch_nvidia
