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

install_debian() {
  command -v dpkg >/dev/null && dpkg -s "${debian[@]}" >/dev/null 2>&1 && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -q >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${debian[@]}" >/dev/null
  else
    echo "the tests of runtime/ need Debian's packages; to install them: sudo apt-get install ${debian[*]}"
  fi
}

fetch_onnxruntime() {
  [ -e "$sdk/onnxruntime/include/onnxruntime_c_api.h" ] && return
  if ! command -v npm >/dev/null; then
    echo "the tests of runtime/ need ONNX Runtime's headers, which npm fetches; install npm, then make setup again"
    return
  fi
  (cd "$work" && npm pack --silent "$ort_package" >/dev/null)
  echo "$ort_sha256  $(echo "$work"/*.tgz)" | sha256sum --check --quiet
  mkdir -p "$sdk/onnxruntime/include"
  tar -xzf "$work"/*.tgz -C "$sdk/onnxruntime/include" --strip-components=7 "$ort_headers"
}

fetch_nvidia() {
  [ -e "$sdk/cuda/include/crt" ] && return
  if ! "$python" -m pip download -q --disable-pip-version-check --no-deps --require-hashes -r "$here/sdks.txt" -d "$work"; then
    echo "the headers of TensorRT and CUDA are not to be had here, so the tests of runtime/ that compile against them are skipped"
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
fetch_nvidia
