//! Files: read whole, and replaced whole.

use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use anyhow::{Context, Result, bail};

/// The text of a file; `None` if it does not exist.
///
/// # Errors
/// When it exists and cannot be read, when it is not an ordinary file, or when
/// its directory does not exist.
pub fn load(path: &Path) -> Result<Option<Vec<u8>>> {
    let shown = path.display();
    match fs::metadata(path) {
        Ok(found) if !found.is_file() => bail!("`{shown}` is not an ordinary file"),
        Ok(_) => {
            let text = fs::read(path);
            text.map(Some)
                .with_context(|| format!("cannot read `{shown}`"))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            if fs::symlink_metadata(path).is_ok() {
                bail!("`{shown}` is a symbolic link that leads nowhere");
            }
            match path.parent() {
                Some(directory) if directory.is_dir() => Ok(None),
                _ => bail!("`{shown}` is not there, and neither is its directory"),
            }
        }
        Err(error) => Err(error).with_context(|| format!("cannot read `{shown}`")),
    }
}

/// Replaces a file so that at every moment it is the old one or the new one,
/// also after a crash. Its owner and mode stay; a new one gets `mode`. `None`
/// removes it.
///
/// # Errors
/// When it cannot be written. The old one is still there then.
pub fn store(path: &Path, text: Option<&[u8]>, mode: u32) -> Result<()> {
    replace(path, text, mode).with_context(|| format!("cannot write `{}`", path.display()))
}

fn replace(path: &Path, text: Option<&[u8]>, new_mode: u32) -> Result<()> {
    // The target of a symbolic link is replaced, not the link.
    let target = match path.canonicalize() {
        Err(error) if error.kind() == ErrorKind::NotFound => path.to_owned(),
        found => found?,
    };
    if fs::symlink_metadata(&target).is_ok_and(|found| !found.is_file()) {
        bail!("it is not an ordinary file");
    }
    let Some(text) = text else {
        return Ok(remove(&target)?);
    };
    let Some(directory) = target.parent() else {
        bail!("it is not in a directory");
    };
    // A fixed name, so that the leftovers of killed runs do not pile up.
    let mut prefix = OsString::from(".");
    prefix.push(target.file_name().unwrap_or_default());
    prefix.push(".iptables_balance");
    remove(&directory.join(&prefix))?;
    let mut file = tempfile::Builder::new()
        .prefix(&prefix)
        .rand_bytes(0)
        .tempfile_in(directory)?;
    file.write_all(text)?;
    let mode = match fs::metadata(&target) {
        Ok(old) => {
            chown(file.path(), Some(old.uid()), Some(old.gid()))?;
            old.mode() & 0o7777
        }
        Err(_) => new_mode,
    };
    file.as_file()
        .set_permissions(fs::Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    file.persist(&target)?;
    fs::File::open(directory)?.sync_all()?;
    Ok(())
}

/// Removes a file. One that does not exist counts as removed.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replacing_a_file_keeps_its_mode_and_its_link() {
        let directory = tempfile::tempdir().unwrap();
        let (real, link) = (directory.path().join("real"), directory.path().join("link"));
        fs::write(&real, "old").unwrap();
        fs::set_permissions(&real, fs::Permissions::from_mode(0o604)).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        store(&link, Some(b"new"), 0o640).unwrap();
        assert_eq!(load(&real).unwrap().unwrap(), b"new");
        assert_eq!(fs::metadata(&real).unwrap().mode() & 0o777, 0o604);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        store(&real, None, 0o640).unwrap();
        assert_eq!(load(&real).unwrap(), None);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        assert!(store(&directory.path().join("none/file"), Some(b""), 0o640).is_err());
    }

    #[test]
    fn only_ordinary_files_are_read_and_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name| directory.path().join(name);
        fs::create_dir(at("directory")).unwrap();
        std::os::unix::fs::symlink("/nowhere", at("link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        for (name, why) in [
            ("directory", "is not an ordinary file"),
            ("socket", "is not an ordinary file"),
            ("link", "leads nowhere"),
            ("none/file", "neither is its directory"),
        ] {
            let error = load(&at(name)).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        assert!(store(&at("socket"), Some(b""), 0o640).is_err());
        assert!(store(&at("directory"), None, 0o640).is_err());
    }
}
