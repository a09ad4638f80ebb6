//! The directories of the program's own files: the one that survives a reboot, and
//! the one that does not.
//!
//! Whoever can write there decides which servers get connections, so a directory
//! that others may write to is refused.

use std::fs::{self, DirBuilder, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::process::geteuid;

use super::files;
use super::lock::named_by;

/// The mode of the directories and of the files in them.
const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// The file that a name stood for at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp(Option<(u64, i64, i64, u64)>);

/// A directory of the program's own files.
#[derive(Clone, Debug)]
pub struct StateDirectory(PathBuf);

impl StateDirectory {
    /// The directory whose files survive a reboot.
    #[must_use]
    pub fn lasting() -> Self {
        Self(named_by(
            "IPTABLES_BALANCE_STATE_DIR",
            "/var/lib/iptables_balance",
        ))
    }

    /// The directory whose files are gone after a reboot.
    #[must_use]
    pub fn volatile() -> Self {
        Self(named_by(
            "IPTABLES_BALANCE_RUNTIME_DIR",
            "/run/iptables_balance",
        ))
    }

    /// The path of a file in it.
    #[must_use]
    pub fn path(&self, file: &str) -> PathBuf {
        self.0.join(file)
    }

    /// Checks that nobody else can write there. A directory that does not exist is
    /// safe: it will be ours.
    ///
    /// # Errors
    /// When others may write there, or it is no directory.
    pub fn check(&self) -> Result<()> {
        let shown = self.0.display();
        let found = match fs::metadata(&self.0) {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("cannot look at `{shown}`")),
        };
        let trusted = [0, geteuid().as_raw()];
        if !found.is_dir() {
            bail!("`{shown}` is not a directory");
        }
        if !trusted.contains(&found.uid()) {
            bail!(
                "`{shown}` belongs to user {}, who could decide which servers get connections; `chown root` it",
                found.uid()
            );
        }
        if found.mode() & 0o022 != 0 {
            bail!(
                "`{shown}` may be written by others (mode {:04o}), who could decide which servers get connections; \
                 `chmod go-w` it",
                found.mode() & 0o7777
            );
        }
        Ok(())
    }

    /// The text of a file; `None` if it, or the directory, does not exist.
    ///
    /// # Errors
    /// When it exists and cannot be read.
    pub fn load(&self, file: &str) -> Result<Option<Vec<u8>>> {
        if !self.0.exists() {
            return Ok(None);
        }
        let path = self.path(file);
        if let Ok(found) = fs::metadata(&path) {
            check_file(&path, &found)?;
        }
        files::load(&path)
    }

    /// A value that is another one after the file was replaced or removed.
    #[must_use]
    pub fn stamp(&self, file: &str) -> Stamp {
        let found = fs::metadata(self.path(file)).ok();
        Stamp(found.map(|found| (found.ino(), found.mtime(), found.mtime_nsec(), found.size())))
    }

    /// Replaces a file as a whole; `None` removes it. The directory is made if need be.
    ///
    /// # Errors
    /// When it cannot be written. The old file is unchanged then.
    pub fn store(&self, file: &str, text: Option<&[u8]>) -> Result<()> {
        if text.is_none() && !self.0.exists() {
            return Ok(());
        }
        make(&self.0)?;
        files::store(&self.path(file), text, FILE_MODE)
    }

    /// The names of the files in it, in order.
    ///
    /// # Errors
    /// When the directory exists and cannot be listed.
    pub fn files(&self) -> Result<Vec<String>> {
        let listing = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            listing => listing.with_context(|| format!("cannot list `{}`", self.0.display()))?,
        };
        let names = listing.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<String> = names.collect();
        names.sort_unstable();
        Ok(names)
    }
}

/// The largest file that is read, in bytes: some hundred thousand backends.
const LARGEST: u64 = 64 << 20;

/// Checks that nobody else can have written a file, and that it is not endless.
fn check_file(path: &Path, found: &Metadata) -> Result<()> {
    let shown = path.display();
    if ![0, geteuid().as_raw()].contains(&found.uid()) || found.mode() & 0o022 != 0 {
        bail!("`{shown}` may have been written by others; `chown root` and `chmod go-w` it");
    }
    if found.len() > LARGEST {
        bail!("`{shown}` has {} bytes, more than {LARGEST}", found.len());
    }
    Ok(())
}

/// Makes a directory that its owner alone can enter.
pub(super) fn make(path: &Path) -> Result<()> {
    let made = DirBuilder::new()
        .recursive(true)
        .mode(DIRECTORY_MODE)
        .create(path);
    made.with_context(|| format!("cannot make the directory `{}`", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn with_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = StateDirectory(scratch.path().join("state"));
        directory.check().unwrap();
        directory.store("EDGE.json", Some(b"{}")).unwrap();
        directory.check().unwrap();
        for mode in [0o770, 0o702, 0o777, 0o1777] {
            with_mode(&directory.0, mode);
            let error = directory.check().unwrap_err().to_string();
            assert!(error.contains(&format!("(mode {mode:04o})")), "{error}");
            assert!(error.contains("`chmod go-w` it"), "{error}");
        }
        let file = StateDirectory(scratch.path().join("state/EDGE.json"));
        assert!(
            file.check()
                .unwrap_err()
                .to_string()
                .contains("is not a directory")
        );
    }

    #[test]
    fn files_are_private_and_replaced_whole() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = StateDirectory(scratch.path().join("a/b"));
        assert_eq!(directory.load("x").unwrap(), None);
        assert_eq!(directory.files().unwrap(), Vec::<String>::new());
        directory.store("x", None).unwrap();
        assert!(!directory.0.exists());
        directory.store("x", Some(b"1")).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(
            (mode(&directory.0), mode(&directory.path("x"))),
            (0o700, 0o600)
        );
        assert_eq!(directory.load("x").unwrap().as_deref(), Some(&b"1"[..]));
        assert_eq!(directory.files().unwrap(), ["x"]);
        directory.store("x", None).unwrap();
        assert_eq!(directory.load("x").unwrap(), None);
    }
}
