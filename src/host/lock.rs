//! One run at a time: an exclusive lock around the last observation, the write and
//! the verification. xtables' own lock only covers each single program.

use std::env;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::io::{Errno, FdFlags, fcntl_setfd};

use super::{capabilities, state_directory};

/// The lock, held until it is dropped; the kernel lets go of it when the
/// process and those that it started have ended, however that comes about.
#[derive(Debug)]
pub struct Lock {
    file: Option<File>,
}

impl Lock {
    /// No lock, for a host that only this process uses.
    #[must_use]
    pub fn none() -> Self {
        Self { file: None }
    }

    /// Waits for the lock for at most that long. Its file is made if need be,
    /// readable and writable by its owner alone, and stays.
    ///
    /// # Errors
    /// When another run still holds it then, or the file cannot be opened.
    pub fn take(wait: Duration) -> Result<Self> {
        let path = lock_file();
        Self::hold(&path, wait)?.with_context(|| {
            format!(
                "another run held the lock `{}` for more than {} s (attribute `wait`)",
                path.display(),
                wait.as_secs()
            )
        })
    }

    /// The lock, if nobody else has it now.
    ///
    /// # Errors
    /// When its file cannot be opened.
    pub fn try_take() -> Result<Option<Self>> {
        Self::hold(&lock_file(), Duration::ZERO)
    }

    /// The lock of a service, in a file of the program's own directory. Programs that the
    /// service starts do not hold it, but for the moment in which they start: a service
    /// that was killed just then holds it a moment longer.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub(super) fn of_file(path: &Path) -> Result<Option<Self>> {
        if let Some(directory) = path.parent() {
            state_directory::make(directory)?;
        }
        let lock = Self::hold(path, Duration::from_secs(1))?;
        if let Some(Self { file: Some(file) }) = &lock {
            fcntl_setfd(file, FdFlags::CLOEXEC)?;
        }
        Ok(lock)
    }

    /// The lock that legacy iptables takes for each program, for one that is too
    /// old to do so itself.
    ///
    /// # Errors
    /// When another program still holds it then, or the file cannot be opened.
    pub fn of_xtables(wait: Duration) -> Result<Self> {
        let path = named_by("XTABLES_LOCKFILE", "/run/xtables.lock");
        Self::hold(&path, wait)?.with_context(|| xtables_held(wait))
    }

    /// `None` when it is still held by another after that time.
    fn hold(path: &Path, wait: Duration) -> Result<Option<Self>> {
        const INTERVAL: Duration = Duration::from_millis(20);
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600);
        let file = options.open(path).with_context(|| {
            format!(
                "cannot open the lock `{}`, which keeps two programs apart{}",
                path.display(),
                capabilities::lacking()
            )
        })?;
        let deadline = Instant::now() + wait;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {
                    // The lock is held until the last program that was started
                    // has ended, also when this process is killed before.
                    fcntl_setfd(&file, FdFlags::empty())?;
                    return Ok(Some(Self { file: Some(file) }));
                }
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    thread::sleep(INTERVAL);
                }
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot lock `{}`", path.display()));
                }
            }
        }
    }
}

fn lock_file() -> PathBuf {
    named_by("IPTABLES_BALANCE_LOCKFILE", "/run/iptables_balance.lock")
}

/// The error when the lock of xtables is not free in time.
pub fn xtables_held(wait: Duration) -> String {
    format!(
        "another program held the xtables lock for more than {} s (attribute `wait`); nothing was written",
        wait.as_secs()
    )
}

/// The path that a variable names, as `XTABLES_LOCKFILE` does for iptables.
pub(super) fn named_by(variable: &str, default: &str) -> PathBuf {
    let named = env::var_os(variable).filter(|name| !name.is_empty());
    named.map_or_else(|| PathBuf::from(default), PathBuf::from)
}
