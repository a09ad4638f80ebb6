#!/usr/bin/env bash
# Builds the packages into target/package: package.sh [x86_64] [aarch64], by default both.
#
# The programs need no more than glibc 2.17: zig links them. As root the script installs missing packages with apt, and for the other
# architecture Debian's library if rustup has none, which adds that architecture to dpkg. Without root it names them. Other tools go to
# target/package-tools. Two builds of one commit with one compiler are identical.
set -euo pipefail
cd "$(dirname "$0")/.."

architectures=("$@")
(($#)) || architectures=(x86_64 aarch64)
for arch in "${architectures[@]}"; do
  [[ $arch == x86_64 || $arch == aarch64 ]] || {
    echo "package.sh: unknown architecture \`$arch\`; it builds for x86_64 and aarch64" >&2
    exit 2
  }
done

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

# --- what is needed -------------------------------------------------------------------------------------------------
tools=$PWD/target/package-tools
export PATH=$tools/bin:$PATH:/usr/sbin:/sbin

# has_library RUSTC TRIPLE: true if the compiler has the standard library for it.
has_library() { [[ -n $("$1" --print target-libdir --target "$2" 2>/dev/null | xargs -I{} find {} -name 'libstd-*.rlib' 2>/dev/null) ]]; }

# compiler TRIPLE: prints a compiler that can build for it: the usual one, with a library of rustup if need be, or Debian's.
compiler() {
  if has_library rustc "$1" || { rustup target add "$1" >/dev/null 2>&1 && has_library rustc "$1"; }; then
    command -v rustc
  elif has_library /usr/bin/rustc "$1"; then
    echo /usr/bin/rustc
  else
    return 1
  fi
}

declare -A package=(
  [git]=git [python3]=python3 [objdump]=binutils [gzip]=gzip [ansible-galaxy]=ansible-core
)
missing=()
for program in "${!package[@]}"; do
  command -v "$program" >/dev/null || missing+=("${package[$program]}")
done
python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
command -v cargo >/dev/null || missing+=(cargo-web)
# Debian's compiler of the web browsers is in the place of a missing one, and of a missing library. Both have one version.
declare -A debian=([x86_64]=amd64 [aarch64]=arm64)
release=$(dpkg-query -W -f '=${Version}' rustc-web 2>/dev/null || true)
add_architecture=
for arch in "${architectures[@]}"; do
  compiler "$arch-unknown-linux-gnu" >/dev/null && continue
  library=libstd-rust-web-dev
  if [[ $arch != "$(uname -m)" ]]; then
    library+=:${debian[$arch]}
    dpkg --print-foreign-architectures | grep -qx "${debian[$arch]}" || add_architecture="dpkg --add-architecture ${debian[$arch]}"
  fi
  missing+=("rustc-web$release" "$library$release")
done
if ((${#missing[@]})); then
  mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
  if ((EUID != 0)); then
    echo "Some packages are missing. As root, type: ${add_architecture:+$add_architecture && }apt-get update && apt-get install ${missing[*]}" >&2
    exit 1
  fi
  say "Installing ${missing[*]}"
  $add_architecture
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
fi
[[ -x $tools/bin/cargo-zigbuild ]] || {
  say "Installing cargo-zigbuild and zig into target/package-tools"
  python3 -m venv "$tools"
  "$tools/bin/pip" --quiet --disable-pip-version-check install cargo-zigbuild==0.24.1 ziglang==0.17.1
}
for tool in cargo-deb@3.8.0 cargo-generate-rpm@0.21.1; do
  [[ $("${tool%@*}" --version 2>/dev/null) == "${tool/@/ }" ]] || {
    say "Compiling $tool into target/package-tools, which takes some minutes"
    cargo install --quiet --locked --root "$tools" "$tool"
  }
done

# --- the programs ---------------------------------------------------------------------------------------------------
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)}
export SOURCE_DATE_EPOCH
# Paths of this machine would make two builds differ.
CARGO_ENCODED_RUSTFLAGS=$(printf '%s\x1f%s' "--remap-path-prefix=$PWD=iptables_balance" \
  "--remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=cargo")
export CARGO_ENCODED_RUSTFLAGS
metadata() {
  cargo metadata --format-version=1 --no-deps --locked | python3 -c "import json, sys; print(json.load(sys.stdin)$1)"
}
version=$(metadata '["packages"][0]["version"]')
target=$(metadata '["target_directory"]')

program_of() { echo "$target/$1-unknown-linux-gnu/release/iptables_balance"; }

build() {
  local triple=$1-unknown-linux-gnu rustc needed
  rustc=$(compiler "$triple")
  say "Building for $1 with $("$rustc" --version)"
  RUSTC=$rustc cargo zigbuild --quiet --release --locked --bin iptables_balance --target "$triple.2.17"
  needed=$(objdump -T "$(program_of "$1")" | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -n 1)
  [[ $(printf '%s\n' "$needed" GLIBC_2.17 | sort -V | tail -n 1) == GLIBC_2.17 ]] || {
    echo "package.sh: the program for $1 needs $needed, more than GLIBC_2.17" >&2
    exit 1
  }
}

# --- the packages ---------------------------------------------------------------------------------------------------
out=$PWD/target/package
stage=$PWD/target/package-stage
rm -rf "$out" "$stage"
mkdir -p "$out" "$stage/man"

# archive FILE DIRECTORY: a tar archive with what is in the directory, the same each time.
archive() {
  tar --create --directory "$2" --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --format=ustar \
    --mode=u+rwX,go+rX,go-w -- $(cd "$2" && ls -A) | gzip -9n >"$1"
}

stage_for_all() {
  for page in module-spec/man/*; do
    gzip -9n <"$page" >"$stage/man/$(basename "$page").gz"
  done
  ln -s ../../../../sbin/iptables_balance "$stage/module"
  maintainer=$(metadata '["packages"][0]["metadata"]["deb"]["maintainer"]')
  printf 'iptables-balance (%s) unstable; urgency=medium\n\n  * The changes are in CHANGELOG.md.\n\n -- %s  %s\n' \
    "$version" "$maintainer" "$(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")" | gzip -9n >"$stage/changelog.gz"
  # The examples call the module and the program as the deb and the rpm install them.
  cp -r examples "$stage/examples"
  sed -i 's/iptables_balance\.gateway\.balancer:/iptables_balance:/' "$stage"/examples/ansible/*.yml
  sed -i 's|\$(sys.workdir)/modules/promises/|/usr/sbin/|' "$stage"/examples/cfengine/*.cf
  cat module-spec/debian-copyright LICENSE-MIT >"$stage/licence"
}

tarball() {
  local name=iptables_balance-$version-$1
  local tree=$stage/tar-$1/$name
  mkdir -p "$tree"/{ansible,cfengine,module-spec}
  install -m 755 "$(program_of "$1")" "$tree/"
  cp -r module-spec/man module-spec/completions module-spec/systemd examples "$tree/"
  cp README.md CHANGELOG.md SECURITY.md LICENSE-MIT LICENSE-APACHE "$tree/"
  cp module-spec/[A-Z]*.md module-spec/*.json "$tree/module-spec/"
  cp module-spec/ansible/iptables_balance.yml "$tree/ansible/"
  cp module-spec/cfengine/enable.cf "$tree/cfengine/"
  archive "$out/$name.tar.gz" "$stage/tar-$1"
}

# The program is stripped already, and apt's own compression is good enough.
deb() {
  cargo deb --quiet --no-build --no-strip --locked --target "$1-unknown-linux-gnu" --output "$out/" >/dev/null
}

rpm_package() {
  cargo generate-rpm --target "$1-unknown-linux-gnu" --auto-req disabled --source-date "$SOURCE_DATE_EPOCH" --output "$out/"
}

# ansible-galaxy writes the time into the archive; it is packed again.
collection() {
  local tree=$stage/collection pairs=() built
  for arch in "${architectures[@]}"; do pairs+=("$arch=$(program_of "$arch")"); done
  module-spec/ansible/collection.sh "$tree" "${pairs[@]}"
  HOME=$stage ansible-galaxy collection build "$tree/ansible_collections/iptables_balance/gateway" --output-path "$stage" >/dev/null
  built=iptables_balance-gateway-$version.tar.gz
  mkdir "$stage/galaxy"
  tar --extract --file "$stage/$built" --directory "$stage/galaxy"
  archive "$out/$built" "$stage/galaxy"
}

cfbs() {
  cp -r module-spec/cfengine/cfbs "$out/cfbs"
  for arch in "${architectures[@]}"; do
    install -m 644 "$(program_of "$arch")" "$out/cfbs/iptables_balance.$arch.dat"
  done
}

stage_for_all
for arch in "${architectures[@]}"; do
  build "$arch"
  tarball "$arch"
  deb "$arch"
  rpm_package "$arch"
done
collection
cfbs
say "In target/package:"
(cd "$out" && find . -type f -printf '%P\n' | sort)
