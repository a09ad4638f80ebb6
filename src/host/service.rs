//! The parts of a program that goes on for ever: signals, the service manager, and
//! news of changed rules.

use std::env;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use rustix::net::{bind, netlink, recv, socket_with};
use rustix::time::{ClockId, clock_gettime};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::low_level::pipe;

use super::lock::Lock;
use super::state_directory::StateDirectory;
use crate::netfilter::Name;

/// A signal that a service heeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGHUP: read the request again.
    Reload,
    /// SIGTERM or SIGINT: end.
    Terminate,
}

/// The signals that have arrived. The descriptor can be read from when there are some.
#[derive(Debug)]
pub struct Signals {
    wake: UnixStream,
    reload: Arc<AtomicBool>,
    terminate: Arc<AtomicBool>,
}

impl Signals {
    /// Heeds the signals from now on.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn open() -> io::Result<Self> {
        let (wake, write) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        let (reload, terminate) = (Arc::default(), Arc::default());
        for (signal, flag) in [
            (SIGHUP, &reload),
            (SIGINT, &terminate),
            (SIGTERM, &terminate),
        ] {
            // The flag is set before the pipe wakes the reader.
            flag::register(signal, Arc::clone(flag))?;
            pipe::register(signal, write.try_clone()?)?;
        }
        Ok(Self {
            wake,
            reload,
            terminate,
        })
    }

    /// The signals since the last time. The end comes first.
    pub fn take(&mut self) -> Vec<Signal> {
        let mut bytes = [0; 64];
        while matches!(self.wake.read(&mut bytes), Ok(1..)) {}
        let signals = [
            (&self.terminate, Signal::Terminate),
            (&self.reload, Signal::Reload),
        ];
        let arrived = signals
            .into_iter()
            .filter(|(flag, _)| flag.swap(false, Ordering::SeqCst));
        arrived.map(|(_, signal)| signal).collect()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// Tells the service manager how the service is, as `sd_notify(3)` has it. Without one
/// nothing is sent.
#[derive(Debug)]
pub struct Notifier {
    socket: Option<(UnixDatagram, SocketAddr)>,
    /// Half of the time after which the manager takes silence for death.
    watchdog: Option<Duration>,
    next: Instant,
    is_ready: bool,
    status: String,
}

impl Notifier {
    /// The service manager that the environment names.
    #[must_use]
    pub fn from_environment() -> Self {
        let address = env::var_os("NOTIFY_SOCKET").and_then(|name| {
            match name.as_bytes().strip_prefix(b"@") {
                Some(name) => SocketAddr::from_abstract_name(name).ok(),
                None => SocketAddr::from_pathname(&name).ok(),
            }
        });
        let socket = address.and_then(|address| Some((nonblocking().ok()?, address)));
        Self {
            socket,
            watchdog: watchdog().map(|limit| limit / 2),
            next: Instant::now(),
            is_ready: false,
            status: String::new(),
        }
    }

    /// The service does what it is for.
    pub fn ready(&mut self) {
        if !self.is_ready {
            self.is_ready = true;
            self.send("READY=1");
        }
    }

    /// The request is read again, until the next [`Self::ready`].
    pub fn reloading(&mut self) {
        let now = clock_gettime(ClockId::Monotonic);
        let microseconds = now.tv_sec * 1_000_000 + now.tv_nsec / 1000;
        self.is_ready = false;
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={microseconds}"));
    }

    /// The service ends.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// The state of the service in one line.
    pub fn status(&mut self, status: &str) {
        if self.status != status {
            status.clone_into(&mut self.status);
            self.send(&format!("STATUS={status}"));
        }
    }

    /// The service is alive. That is sent as often as the manager wants to hear it.
    pub fn alive(&mut self) {
        let now = Instant::now();
        if let Some(pause) = self.watchdog.filter(|_| now >= self.next) {
            self.next = now + pause;
            self.send("WATCHDOG=1");
        }
    }

    /// The moment at which the manager wants to hear of the service.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.watchdog.map(|_| self.next)
    }

    fn send(&self, message: &str) {
        if let Some((socket, address)) = &self.socket {
            // A manager that does not listen is no reason to stop.
            socket.send_to_addr(message.as_bytes(), address).ok();
        }
    }
}

/// A socket that loses a message where a manager does not read: checks do not wait.
fn nonblocking() -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// The time limit of the watchdog, if it is meant for this process.
fn watchdog() -> Option<Duration> {
    let number = |name: &str| env::var(name).ok()?.parse::<u64>().ok();
    let is_ours = env::var_os("WATCHDOG_PID").is_none()
        || number("WATCHDOG_PID") == Some(std::process::id().into());
    let limit = number("WATCHDOG_USEC").filter(|limit| is_ours && *limit > 0)?;
    Some(Duration::from_micros(limit))
}

/// News of changed rules of nftables in this network namespace. The descriptor can be
/// read from when there are some.
#[derive(Debug)]
pub struct RuleEvents(OwnedFd);

impl RuleEvents {
    /// Listens from now on.
    ///
    /// # Errors
    /// When the kernel has no nftables, or forbids that.
    pub fn open() -> io::Result<Self> {
        /// `NFNLGRP_NFTABLES` of `linux/netfilter/nfnetlink.h`, as a bit.
        const NFTABLES: u32 = 1 << (7 - 1);
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            Some(netlink::NETFILTER),
        )?;
        bind(&socket, &netlink::SocketAddrNetlink::new(0, NFTABLES))?;
        Ok(Self(socket))
    }

    /// Takes all news; returns true if there were some, or if some were lost.
    pub fn drain(&mut self) -> bool {
        let mut buffer = [0; 8192];
        let mut are_there = false;
        loop {
            match recv(&self.0, &mut buffer, RecvFlags::empty()) {
                Ok(_) | Err(Errno::NOBUFS) => are_there = true,
                Err(Errno::INTR) => {}
                Err(_) => return are_there,
            }
        }
    }
}

impl AsFd for RuleEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The right to be the only service of a name, until it is dropped.
#[derive(Debug)]
pub struct Singleton {
    _lock: Lock,
}

impl Singleton {
    /// # Errors
    /// When there is one already, or its file cannot be opened.
    pub fn of(name: &Name) -> Result<Self> {
        let directory = StateDirectory::volatile();
        directory.check()?;
        let path = directory.path(&format!("{}.watch", name.as_str()));
        match Lock::of_file(&path)? {
            Some(lock) => Ok(Self { _lock: lock }),
            None => bail!(
                "another watcher of `{}` is running; stop it first",
                name.as_str()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notifier_without_a_manager_is_silent() {
        let mut notifier = Notifier {
            socket: None,
            watchdog: None,
            next: Instant::now(),
            is_ready: false,
            status: String::new(),
        };
        notifier.ready();
        notifier.alive();
        assert_eq!(notifier.next_due(), None);
    }
}
