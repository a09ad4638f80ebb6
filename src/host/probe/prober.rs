//! The loop that waits for all probes.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::bypass::Bypass;
use super::connection::{Connection, Verdict};
use super::{Probe, ProbeFailure};

/// The most events that are taken from the kernel at once.
const EVENTS: usize = 256;
/// The descriptors that are left for everything else: programs and their pipes,
/// files, locks.
const RESERVED: usize = 64;
/// The bit that tells a source from a probe in an event.
const SOURCE: u64 = 1 << 63;
/// The longest wait. The caller sees it as one that ended early.
const LONGEST_WAIT: Duration = Duration::from_secs(24 * 3600);

/// A probe and its verdict.
pub type ProbeResult = (usize, Result<(), ProbeFailure>);

/// A source that is not a probe: signals, events of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceKey(pub u32);

/// Carries out probes, any number at once, in the caller's thread.
pub struct Prober {
    epoll: OwnedFd,
    events: Vec<epoll::Event>,
    running: HashMap<usize, Running>,
    /// The ends of the times that the running probes have.
    ends: BTreeSet<(Instant, usize)>,
    /// Probes that wait for a descriptor. Their time has not begun.
    queued: VecDeque<(usize, Probe)>,
    /// Results that were known at once.
    known: Vec<ProbeResult>,
    /// The most probes that run at once.
    most: usize,
    /// True when the limit of descriptors is as high as it may be.
    is_raised: bool,
    sources: usize,
    bypass: Option<Bypass>,
    /// The moment from which nobody has looked at events.
    unseen_since: Instant,
}

/// A probe that has a connection.
struct Running {
    connection: Connection,
    started: Instant,
    end: Instant,
    timeout: Duration,
}

impl Prober {
    /// # Errors
    /// When there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            events: Vec::with_capacity(EVENTS),
            running: HashMap::new(),
            ends: BTreeSet::new(),
            queued: VecDeque::new(),
            known: Vec::new(),
            most: probes_within(getrlimit(Resource::Nofile).current),
            is_raised: false,
            sources: 0,
            bypass: None,
            unseen_since: Instant::now(),
        })
    }

    /// Keeps later probes out of the rules of nat, and out of those of filter that
    /// are about new connections, or no longer: see the module `bypass`.
    ///
    /// # Errors
    /// When the kernel cannot do that; the probes go on as before.
    pub fn bypass_rules(&mut self, bypass: bool) -> io::Result<()> {
        match (bypass, &self.bypass) {
            (true, None) => self.bypass = Some(Bypass::open()?),
            (true, Some(_)) => {}
            (false, _) => self.bypass = None,
        }
        Ok(())
    }

    /// Starts a probe; one of that number that runs is cancelled. Never waits: a
    /// failure at once is reported by the next [`Self::wait`], and a probe for which
    /// no descriptor is left begins when another one has ended.
    pub fn start(&mut self, id: usize, probe: &Probe) {
        self.cancel(id);
        if self.is_full() || !self.queued.is_empty() {
            self.queued.push_back((id, probe.clone()));
            return;
        }
        self.begin(id, probe);
    }

    /// Ends a probe without a result.
    pub fn cancel(&mut self, id: usize) {
        if !self.remove(id) {
            self.queued.retain(|(queued, _)| *queued != id);
            self.known.retain(|(known, _)| *known != id);
        }
    }

    /// Returns true if no probe is without a result.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.queued.is_empty() && self.known.is_empty()
    }

    /// Watches something else, until its descriptor is closed: [`Self::wait`]
    /// reports it as long as it can be read from.
    ///
    /// # Errors
    /// When the kernel cannot wait for it.
    pub fn add_source(&mut self, source: impl AsFd, key: SourceKey) -> io::Result<()> {
        let data = epoll::EventData::new_u64(SOURCE | u64::from(key.0));
        epoll::add(&self.epoll, source, data, epoll::EventFlags::IN)?;
        self.sources += 1;
        Ok(())
    }

    /// Waits until `deadline`, a result, or a source that can be read from. Returns
    /// such sources and adds results. Without a deadline, a probe or a source it
    /// returns at once.
    ///
    /// Answers are read before times are judged, and an exchange of a caller that was
    /// busy gets that time back: being busy makes no good answer a late one.
    ///
    /// # Errors
    /// When the kernel cannot wait.
    pub fn wait(
        &mut self,
        deadline: Option<Instant>,
        results: &mut Vec<ProbeResult>,
    ) -> io::Result<Vec<SourceKey>> {
        let (before, mut ready) = (results.len(), BTreeSet::new());
        loop {
            let pause = self.pause(deadline);
            self.take_events(pause, &mut ready, results)?;
            self.expire(results);
            self.begin_queued();
            results.append(&mut self.known);
            let is_over = deadline.is_some_and(|deadline| deadline <= Instant::now());
            let is_pointless = deadline.is_none() && self.sources == 0 && self.is_idle();
            if results.len() > before || !ready.is_empty() || is_over || is_pointless {
                return Ok(ready.into_iter().collect());
            }
        }
    }

    fn is_full(&mut self) -> bool {
        if self.running.len() >= self.most && !self.is_raised {
            self.is_raised = true;
            self.most = raise_limit();
        }
        self.running.len() >= self.most
    }

    /// Connects; returns false if that has to wait.
    fn begin(&mut self, id: usize, probe: &Probe) -> bool {
        let started = Instant::now();
        let opened = Connection::open(probe, self.bypass.as_mut()).and_then(|connection| {
            let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
            let data = epoll::EventData::new_u64(id as u64 & !SOURCE);
            epoll::add(&self.epoll, &connection.socket, data, flags)
                .map_err(ProbeFailure::local)?;
            Ok(connection)
        });
        match opened {
            Ok(connection) => {
                let end = started + probe.timeout;
                self.ends.insert((end, id));
                let timeout = probe.timeout;
                let running = Running {
                    connection,
                    started,
                    end,
                    timeout,
                };
                self.running.insert(id, running);
            }
            // Others hold the descriptors: the end of a probe of ours frees one.
            Err(ProbeFailure::Local(_)) if !self.running.is_empty() => {
                self.queued.push_front((id, probe.clone()));
                return false;
            }
            Err(failure) => self.known.push((id, Err(failure))),
        }
        true
    }

    fn begin_queued(&mut self) {
        while !self.is_full() {
            match self.queued.pop_front() {
                Some((id, probe)) if self.begin(id, &probe) => {}
                _ => return,
            }
        }
    }

    fn remove(&mut self, id: usize) -> bool {
        let removed = self.running.remove(&id);
        if let Some(running) = &removed {
            self.ends.remove(&(running.end, id));
        }
        removed.is_some()
    }

    /// The time until something is due without an event.
    fn pause(&self, deadline: Option<Instant>) -> Option<Duration> {
        if !self.known.is_empty() {
            return Some(Duration::ZERO);
        }
        let end = self.ends.first().map(|(end, _)| *end);
        let first = [deadline, end].into_iter().flatten().min();
        match first {
            Some(first) => Some(first.saturating_duration_since(Instant::now())),
            None if self.sources == 0 && self.is_idle() => Some(Duration::ZERO),
            None => None,
        }
    }

    /// Waits for events once and handles all that there are.
    fn take_events(
        &mut self,
        pause: Option<Duration>,
        ready: &mut BTreeSet<SourceKey>,
        results: &mut Vec<ProbeResult>,
    ) -> io::Result<()> {
        let mut unseen_since = Some(self.unseen_since);
        let mut pause = pause;
        loop {
            let mut events = mem::take(&mut self.events);
            events.clear();
            let entered = Instant::now();
            let timeout = pause.map(in_whole_milliseconds);
            let waited = epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref());
            if let Err(error) = waited {
                self.events = events;
                return match error {
                    Errno::INTR => Ok(()),
                    error => Err(error.into()),
                };
            }
            for event in &events {
                let (data, flags) = (event.data.u64(), event.flags);
                match u32::try_from(data & !SOURCE) {
                    Ok(key) if data & SOURCE != 0 => drop(ready.insert(SourceKey(key))),
                    _ => {
                        let id = usize::try_from(data).unwrap_or(usize::MAX);
                        let busy = unseen_since.map(|since| (since, entered));
                        results.extend(self.advance(id, flags, busy).map(|verdict| (id, verdict)));
                    }
                }
            }
            let is_all = events.len() < EVENTS;
            self.events = events;
            if is_all {
                self.unseen_since = Instant::now();
                return Ok(());
            }
            (unseen_since, pause) = (None, Some(Duration::ZERO));
        }
    }

    /// Goes on with a probe. An exchange that goes on gets back the time in which
    /// the caller was `busy`.
    fn advance(
        &mut self,
        id: usize,
        flags: epoll::EventFlags,
        busy: Option<(Instant, Instant)>,
    ) -> Option<Verdict> {
        let running = self.running.get_mut(&id)?;
        let verdict = running.connection.advance(flags);
        if verdict.is_some() {
            self.remove(id);
        } else if let (true, Some((since, entered))) = (running.connection.needs_us(), busy) {
            let lost = entered.saturating_duration_since(since.max(running.started));
            self.ends.remove(&(running.end, id));
            running.end += lost;
            self.ends.insert((running.end, id));
        }
        verdict
    }

    fn expire(&mut self, results: &mut Vec<ProbeResult>) {
        let now = Instant::now();
        while let Some((_, id)) = self.ends.first().copied().filter(|(end, _)| *end <= now) {
            let timeout = self.running.get(&id).map(|running| running.timeout);
            self.remove(id);
            results.extend(timeout.map(|timeout| (id, Err(ProbeFailure::TimedOut(timeout)))));
        }
    }
}

/// A whole number of milliseconds, rounded up: rounded down the loop would turn
/// without waiting in the last one.
fn in_whole_milliseconds(pause: Duration) -> Timespec {
    let millis = pause.min(LONGEST_WAIT).as_micros().div_ceil(1000);
    let pause = Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX));
    Timespec::try_from(pause).unwrap_or_default()
}

/// The number of probes that a limit of descriptors allows at once.
fn probes_within(limit: Option<u64>) -> usize {
    let limit = limit.map_or(usize::MAX, |limit| {
        usize::try_from(limit).unwrap_or(usize::MAX)
    });
    limit.saturating_sub(RESERVED).max(1)
}

/// Raises the limit of descriptors to the highest one that is allowed; returns the
/// number of probes that it allows at once.
fn raise_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    match limit.current == limit.maximum || setrlimit(Resource::Nofile, raised).is_err() {
        true => probes_within(limit.current),
        false => probes_within(limit.maximum),
    }
}
