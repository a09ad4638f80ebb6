//! The programs of iptables, and the variant that they belong to.

use std::env;
use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};

use super::process::Process;
use crate::netfilter::{Family, Variant};

/// Finds a program as Ansible does: in the absolute directories of PATH, then
/// where administrators' programs are on every distribution.
pub fn find(name: &str) -> Option<PathBuf> {
    const ALWAYS: [&str; 3] = ["/sbin", "/usr/sbin", "/usr/local/sbin"];
    let path = env::var_os("PATH").unwrap_or_default();
    let directories = env::split_paths(&path).chain(ALWAYS.iter().map(PathBuf::from));
    let mut candidates = directories
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join(name));
    candidates.find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// The programs of one variant. Those of a family may be missing.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The variant of the programs.
    pub variant: Variant,
    /// True if they have the plain names, `iptables-save` and the like.
    plain: bool,
}

impl Programs {
    /// Chooses a variant.
    ///
    /// # Errors
    /// When there is no such iptables; names the package to install.
    pub fn choose(choice: Option<Variant>) -> Result<Self> {
        let plain = find("iptables-save")
            .map(|path| variant_of(&path))
            .transpose()?;
        let named =
            |variant: Variant| find(&format!("iptables-{}-save", variant.as_str())).is_some();
        let wanted = match choice {
            None => vec![Variant::Nft, Variant::Legacy],
            Some(variant) => vec![variant],
        };
        if let Some(variant) = plain.filter(|variant| wanted.contains(variant)) {
            return Ok(Self {
                variant,
                plain: true,
            });
        }
        match wanted.iter().find(|variant| named(**variant)) {
            Some(variant) => Ok(Self {
                variant: *variant,
                plain: false,
            }),
            None => bail!("{}", missing(choice)),
        }
    }

    /// The path of `iptables-save`, `ip6tables-restore` and the like.
    ///
    /// # Errors
    /// When it is not there.
    pub fn path(&self, family: Family, tool: &str) -> Result<PathBuf> {
        let name = self.name(family, tool);
        match find(&name) {
            Some(path) => Ok(path),
            None => bail!(
                "`{name}` is not in PATH, /sbin, /usr/sbin or /usr/local/sbin; install the package `iptables`"
            ),
        }
    }

    fn name(&self, family: Family, tool: &str) -> String {
        let program = match family {
            Family::Ipv4 => "iptables",
            Family::Ipv6 => "ip6tables",
        };
        match self.plain {
            true => format!("{program}-{tool}"),
            false => format!("{program}-{}-{tool}", self.variant.as_str()),
        }
    }
}

fn missing(choice: Option<Variant>) -> String {
    let which = choice.map_or_else(String::new, |variant| {
        format!(" of variant `{}`", variant.as_str())
    });
    format!(
        "there is no `iptables-save`{which} in PATH, /sbin, /usr/sbin or /usr/local/sbin; \
         install the package `iptables` (Debian, Ubuntu, Alpine, Arch, SUSE), `iptables-nft` or `iptables-legacy` (Fedora, RHEL)"
    )
}

/// The variant of a program. Each variant is one program with many names, and
/// the name of the file tells which it is; any other file is asked for its
/// version.
fn variant_of(save: &Path) -> Result<Variant> {
    let real = save.canonicalize()?;
    match real.file_name().and_then(OsStr::to_str) {
        Some("xtables-nft-multi" | "xtables-compat-multi") => Ok(Variant::Nft),
        Some("xtables-legacy-multi" | "xtables-multi") => Ok(Variant::Legacy),
        _ => asked(save),
    }
}

/// `iptables-save v1.8.9 (nf_tables)`. Before 1.8 there was but one variant, and
/// no option `--version`: 1.6.0 prints a dump nevertheless, 1.6.2 ends with an error.
fn asked(save: &Path) -> Result<Variant> {
    const LIMIT: Duration = Duration::from_secs(10);
    let mut text = Vec::new();
    let process = Process::start(save, &[OsStr::new("--version")], LIMIT)?;
    let finished = process.drain(&mut |piece| text.extend_from_slice(piece))?;
    let knows_no_version = finished.stderr.contains("unrecognized option '--version'");
    if knows_no_version {
        return Ok(Variant::Legacy);
    }
    finished.success()?;
    match String::from_utf8_lossy(&text).contains("(nf_tables)") {
        true => Ok(Variant::Nft),
        false => Ok(Variant::Legacy),
    }
}
