//! The files with rules that are loaded at boot, as each distribution has them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::netfilter::Family;

/// The file of each family that is loaded at boot, below `root`.
///
/// # Errors
/// When there is none; names the package to install.
pub fn files(root: &Path) -> Result<BTreeMap<Family, PathBuf>> {
    let loaded = |family| Some((family, loaded(root, family)?));
    let found: BTreeMap<_, _> = Family::BOTH.into_iter().filter_map(loaded).collect();
    if found.is_empty() {
        bail!(
            "persist: nothing on this host would load rules at boot; install `iptables-persistent` (Debian, Ubuntu) or \
             `iptables-services` (Fedora, RHEL), or name the file that is loaded"
        );
    }
    Ok(found)
}

/// Debian and its kin run the plugins of netfilter-persistent; Fedora and its
/// kin have services with scripts; Arch has units that name the file; Alpine
/// and Gentoo name it in a configuration file of `OpenRC`.
fn loaded(root: &Path, family: Family) -> Option<PathBuf> {
    let (program, plugin, debian) = match family {
        Family::Ipv4 => ("iptables", "15-ip4tables", "/etc/iptables/rules.v4"),
        Family::Ipv6 => ("ip6tables", "25-ip6tables", "/etc/iptables/rules.v6"),
    };
    let at = |path: &str| root.join(path.trim_start_matches('/'));
    if at("/usr/share/netfilter-persistent/plugins.d")
        .join(plugin)
        .exists()
    {
        return Some(debian.into());
    }
    let units = ["/etc", "/usr/lib", "/lib"]
        .map(|parent| format!("{parent}/systemd/system/{program}.service"));
    let unit = units
        .iter()
        .find_map(|unit| fs::read_to_string(at(unit)).ok());
    if let Some(unit) = unit {
        return from_unit(&unit, program);
    }
    let settings = fs::read_to_string(at(&format!("/etc/conf.d/{program}"))).ok()?;
    let name = format!("{}_SAVE=", program.to_uppercase());
    let line = |line: &str| {
        let line = line.trim();
        let line = line.strip_prefix("export ").unwrap_or(line);
        line.strip_prefix(&name).map(str::to_owned)
    };
    let value = settings.lines().filter_map(line).next_back()?;
    let value = value.split('#').next()?.trim();
    plain_path(value.trim_matches(['"', '\'']))
}

/// The file that a unit loads: `ExecStart=/usr/bin/iptables-restore
/// /etc/iptables/iptables.rules`, or
/// `ExecStart=/usr/libexec/iptables/iptables.init start`. Any other command is
/// not understood, and gives no file.
fn from_unit(unit: &str, program: &str) -> Option<PathBuf> {
    let starts = unit.lines().filter_map(|line| {
        let (name, command) = line.split_once('=')?;
        (name.trim() == "ExecStart").then(|| command.trim())
    });
    let file = |command: &str| {
        let mut words = command.split_whitespace();
        let started = words.next()?.trim_start_matches(['-', '@', ':', '+', '!']);
        let started = started.rsplit('/').next()?;
        let is_restore = started.starts_with(program) && started.ends_with("-restore");
        match started.strip_prefix(program) {
            Some(".init") => Some(PathBuf::from("/etc/sysconfig").join(program)),
            _ if is_restore => plain_path(words.next_back()?)
                .filter(|_| words.all(|option| option.starts_with('-'))),
            _ => None,
        }
    };
    starts.filter_map(file).next_back()
}

/// An absolute path in which nothing stands for something else.
fn plain_path(path: &str) -> Option<PathBuf> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte);
    (path.starts_with('/') && path.bytes().all(plain)).then(|| path.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The result of the search in a directory with these files.
    fn found(present: &[(&str, &str)]) -> Result<Vec<String>> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in present {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let files = files(root.path())?;
        let shown =
            |(family, path): (&Family, &PathBuf)| format!("{} {}", family.as_str(), path.display());
        Ok(files.iter().map(shown).collect())
    }

    #[test]
    fn each_distribution_has_its_own_files() {
        let plugins = "usr/share/netfilter-persistent/plugins.d";
        assert_eq!(
            found(&[
                (&format!("{plugins}/15-ip4tables"), ""),
                (&format!("{plugins}/25-ip6tables"), "")
            ])
            .unwrap(),
            ["ipv4 /etc/iptables/rules.v4", "ipv6 /etc/iptables/rules.v6"]
        );
        let rhel = "[Service]\nExecStart=/usr/libexec/iptables/iptables.init start\n";
        assert_eq!(
            found(&[("usr/lib/systemd/system/iptables.service", rhel)]).unwrap(),
            ["ipv4 /etc/sysconfig/iptables"]
        );
        let arch =
            "[Service]\nExecStart=/usr/bin/ip6tables-restore /etc/iptables/ip6tables.rules\n";
        assert_eq!(
            found(&[("usr/lib/systemd/system/ip6tables.service", arch)]).unwrap(),
            ["ipv6 /etc/iptables/ip6tables.rules"]
        );
        for line in [
            "IPTABLES_SAVE=\"/etc/iptables/rules-save\"",
            "export IPTABLES_SAVE='/etc/iptables/rules-save' # where",
        ] {
            assert_eq!(
                found(&[("etc/conf.d/iptables", &format!("# x\n{line}\n"))]).unwrap(),
                ["ipv4 /etc/iptables/rules-save"]
            );
        }
    }

    #[test]
    fn a_unit_is_understood_or_not_taken() {
        let unit = |lines: &str| {
            let text = format!("[Service]\n{lines}\n");
            found(&[("etc/systemd/system/iptables.service", &text)]).ok()
        };
        for lines in [
            "ExecStart=\nExecStart=-/sbin/iptables-restore -w /etc/rules",
            "ExecStart = /usr/sbin/iptables-nft-restore /etc/rules",
        ] {
            assert_eq!(unit(lines).unwrap(), ["ipv4 /etc/rules"], "{lines}");
        }
        for lines in [
            "ExecStart=/bin/sh -c \"/sbin/iptables-restore < /etc/iptables.rules\"",
            "ExecStart=/sbin/iptables-restore /etc/a ; /sbin/ip6tables-restore /etc/b",
            "ExecStart=/sbin/iptables-restore /etc/%i",
            "ExecStart=/sbin/ip6tables-restore /etc/b",
        ] {
            assert_eq!(unit(lines), None, "{lines}");
        }
    }

    #[test]
    fn without_a_boot_loader_the_error_names_the_package() {
        let error = found(&[]).unwrap_err().to_string();
        assert!(error.contains("install `iptables-persistent`"), "{error}");
        assert!(
            found(&[(
                "usr/lib/systemd/system/iptables.service",
                "[Service]\nExecStart=/bin/true\n"
            )])
            .is_err()
        );
    }
}
