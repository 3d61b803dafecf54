#!/usr/bin/env bash
# Fetches what the machine that lends a GPU lacks, and says what to carry there.
#
#   scripts/gpu_wheels.sh [FOLDER]      wheels in FOLDER (default .wheels), of the versions that constraints.txt pins
#   PYTHON_VERSION=3.12                 of that machine
#
# Nothing can be fetched there: scripts/gpu_check.sh installs the wheels into a folder of its own. Dependencies that are there
# already (torch, numpy, huggingface-hub, ...) are not fetched, so each package below is named with all that it needs besides.
set -euo pipefail

cd "$(dirname "$0")/.."
folder=${1:-.wheels}
version=${PYTHON_VERSION:-3.12}
limit=$((40 << 20)) # bytes of wheels; the tree that travels has 60 MiB in all
tree_limit=$((60 << 20))
pinned=(diffusers nvtx tyro)
needed=(docstring-parser==0.18.0 importlib-metadata==10.2.0 typeguard==4.6.1)

packages=("${needed[@]}")
for name in "${pinned[@]}"; do
  packages+=("$(grep "^$name==" constraints.txt)")
done
platforms=()
for glibc in 2_17 2_24 2_27 2_28 2_34 2_35; do
  platforms+=(--platform "manylinux_${glibc}_x86_64")
done

if [ -d "$folder" ] && find "$folder" -mindepth 1 ! -name '*.whl' ! -name COMMIT | grep -q .; then
  echo "gpu_wheels: expected a folder of wheels or none, got $folder with other files"
  exit 1
fi
fetched=$(mktemp -d)
trap 'rm -rf "$fetched"' EXIT
python3 -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: --implementation cp \
  --python-version "$version" "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$fetched" "${packages[@]}"
mkdir -p "$folder"
rm -f "$folder"/*.whl
cp "$fetched"/*.whl "$folder"
git describe --always --dirty --abbrev=40 >"$folder/COMMIT" # the sources travel without their history

size() { du --bytes --total "$@" | tail -n 1 | cut -f 1; }
wheels=$(size "$folder"/*.whl)
extension=(fastunlearn/_C.abi3.so fastunlearn/_C_cuda.abi3.so)
carry=("$folder")
for library in "${extension[@]}"; do
  newer=$(find csrc CMakeLists.txt -newer "$library" 2>/dev/null | head -n 1)
  [ -f "$library" ] && [ -n "$newer" ] && echo "gpu_wheels: $library is older than $newer: build it again"
  [ -f "$library" ] && carry+=("$library") && continue
  echo "gpu_wheels: $library is not built: it would be built on the machine (FASTUNLEARN_CUDA=check make test builds it here)"
done
mapfile -d '' -t files < <(git ls-files --cached --others --exclude-standard -z)
tree=$(size "${files[@]}" "${carry[@]}")

ls -l "$folder"
echo "wheels: $((wheels >> 20)) MiB, the whole tree with them: $((tree >> 20)) MiB"
printf 'carry: '
printf '"%s" ' "${carry[@]}"
echo
((wheels <= limit)) || { echo "gpu_wheels: expected at most $limit bytes of wheels, got $wheels"; exit 1; }
((tree <= tree_limit)) || { echo "gpu_wheels: expected at most $tree_limit bytes in all, got $tree"; exit 1; }
