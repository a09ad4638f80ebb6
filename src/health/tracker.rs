//! The health of every backend over time, and the moments of the next checks.
//!
//! A verdict changes after `fall` failed checks in a row, or after `rise` good ones.
//! A backend of which nothing is known yet gets its first verdict as in a single run:
//! up after one good check, down after `fall` failed ones, without waiting for
//! `interval` in between. No clock is read here.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::request::{Health, Verdict};

/// The checks of many backends. Each has the number in which it was added.
#[derive(Debug)]
pub struct Tracker {
    tracks: Vec<Track>,
    due: BTreeSet<(Instant, usize)>,
    dice: Dice,
    /// The beginning of the grid on which checks begin.
    origin: Option<Instant>,
}

/// The checks of one backend.
#[derive(Debug)]
struct Track {
    interval: Duration,
    /// The time from one check to the next while nothing is known.
    pause: Duration,
    rise: u32,
    fall: u32,
    verdict: Option<Verdict>,
    /// The checks in a row that speak against the verdict.
    against: u32,
    begun: Instant,
    /// True until the second check, whose moment is random.
    is_first: bool,
}

impl Tracker {
    /// A tracker without backends. With the same seed, the moments are the same.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            tracks: Vec::new(),
            due: BTreeSet::new(),
            dice: Dice(seed),
            origin: None,
        }
    }

    /// Adds a backend, with the verdict that is known of it; returns its number.
    pub fn add(&mut self, health: &Health, verdict: Option<Verdict>, now: Instant) -> usize {
        let id = self.tracks.len();
        let first = match verdict {
            None => now,
            Some(_) => now + self.dice.below(health.interval),
        };
        self.tracks.push(Track {
            interval: health.interval,
            pause: health.interval.min(health.timeout),
            rise: health.rise,
            fall: health.fall,
            verdict,
            against: 0,
            begun: now,
            is_first: verdict.is_none(),
        });
        self.due.insert((first, id));
        id
    }

    /// The moment of the next check, if none is missing.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(moment, _)| *moment)
    }

    /// The backends whose check begins now. Each is due again only after its result.
    pub fn due(&mut self, now: Instant) -> Vec<usize> {
        let mut due = Vec::new();
        while let Some((_, id)) = self
            .due
            .first()
            .copied()
            .filter(|(moment, _)| *moment <= now)
        {
            self.due.pop_first();
            self.tracks[id].begun = now;
            due.push(id);
        }
        due
    }

    /// Records the result of a check; returns the verdict if it is a new one.
    pub fn record(&mut self, id: usize, is_good: bool, now: Instant) -> Option<Verdict> {
        let verdict = self.tracks[id].record(is_good);
        self.schedule(id, now);
        verdict
    }

    /// Passes over a check that says nothing about the backend. One of which nothing is
    /// known counts as up then, as in a run that cannot probe.
    pub fn skip(&mut self, id: usize, now: Instant) {
        self.tracks[id].verdict.get_or_insert(Verdict::Up);
        self.schedule(id, now);
    }

    /// The verdict about a backend; `None` while nothing is known.
    #[must_use]
    pub fn verdict(&self, id: usize) -> Option<Verdict> {
        self.tracks[id].verdict
    }

    /// Returns true if there is a backend of which nothing is known yet.
    #[must_use]
    pub fn has_unknown(&self) -> bool {
        self.tracks.iter().any(|track| track.verdict.is_none())
    }

    /// The next check begins an interval after the last one began, more or less: with
    /// a tenth of chance, and spread over a whole interval after the first, so that
    /// thousands of checks do not fall into step.
    fn schedule(&mut self, id: usize, now: Instant) {
        let track = &mut self.tracks[id];
        let interval = track.interval;
        let next = match (track.verdict, track.is_first) {
            (None, _) => track.begun + track.pause,
            (Some(_), true) => {
                track.is_first = false;
                now + self.dice.below(track.interval)
            }
            (Some(_), false) => {
                let tenth = track.interval / 10;
                track.begun + tenth * 9 + self.dice.below(tenth * 2)
            }
        };
        let next = self.on_grid(next.max(now), interval);
        self.due.insert((next, id));
    }

    /// The next moment on a grid of a twentieth of an interval. Checks that begin
    /// together wake the program once.
    fn on_grid(&mut self, moment: Instant, interval: Duration) -> Instant {
        let origin = *self.origin.get_or_insert(moment);
        let grid = (interval / 20).as_nanos().max(1);
        let past = moment.saturating_duration_since(origin).as_nanos() % grid;
        let rest = (grid - past) % grid;
        moment + Duration::from_nanos(u64::try_from(rest).unwrap_or_default())
    }
}

impl Track {
    fn record(&mut self, is_good: bool) -> Option<Verdict> {
        let (found, needed) = match (is_good, self.verdict) {
            (true, None) => (Verdict::Up, 1),
            (true, _) => (Verdict::Up, self.rise),
            (false, _) => (Verdict::Down, self.fall),
        };
        if self.verdict == Some(found) {
            self.against = 0;
            return None;
        }
        self.against += 1;
        if self.against < needed {
            return None;
        }
        self.against = 0;
        self.verdict = Some(found);
        Some(found)
    }
}

/// Pseudo-random numbers (`SplitMix64`). They spread checks, and decide nothing.
#[derive(Debug)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A time from nothing up to that much.
    fn below(&mut self, most: Duration) -> Duration {
        let thousandths = u32::try_from(self.roll() % 1000).unwrap_or_default();
        most * thousandths / 1000
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn health(rise: u32, fall: u32) -> Health {
        Health {
            interval: Duration::from_secs(1),
            timeout: Duration::from_millis(200),
            rise,
            fall,
            ..Health::default()
        }
    }

    fn verdicts(first: Option<Verdict>, results: &str) -> String {
        let now = Instant::now();
        let mut tracker = Tracker::new(1);
        tracker.add(&health(2, 3), first, now);
        let letter = |verdict| match verdict {
            None => '.',
            Some(Verdict::Up) => 'U',
            Some(Verdict::Down) => 'D',
        };
        let results = results.chars();
        results
            .map(|result| letter(tracker.record(0, result == '+', now)))
            .collect()
    }

    #[test]
    fn a_verdict_changes_after_rise_or_fall_checks_in_a_row() {
        let up = Some(Verdict::Up);
        assert_eq!(verdicts(up, "--+---+-++--"), ".....D...U..");
        assert_eq!(verdicts(up, "-+--+--+--+-"), "............");
        assert_eq!(verdicts(Some(Verdict::Down), "+-+-++"), ".....U");
    }

    #[test]
    fn the_first_verdict_takes_one_good_check_or_fall_failed_ones() {
        assert_eq!(verdicts(None, "+"), "U");
        assert_eq!(verdicts(None, "-+"), ".U");
        assert_eq!(verdicts(None, "---"), "..D");
    }

    #[test]
    fn a_check_is_due_again_only_after_its_result() {
        let now = Instant::now();
        let mut tracker = Tracker::new(1);
        tracker.add(&health(1, 1), None, now);
        assert_eq!(tracker.due(now), [0]);
        assert_eq!(tracker.next_due(), None);
        // While nothing is known it does not wait for the interval.
        let mut tracker = Tracker::new(1);
        tracker.add(&health(1, 2), None, now);
        tracker.due(now);
        tracker.record(0, false, now);
        assert_eq!(tracker.next_due(), Some(now + Duration::from_millis(200)));
        assert!(tracker.has_unknown());
        tracker.skip(0, now);
        assert!(!tracker.has_unknown());
    }

    proptest! {
        #[test]
        fn checks_come_about_once_an_interval_and_not_in_step(seed: u64) {
            let start = Instant::now();
            let mut tracker = Tracker::new(seed);
            for _ in 0..200 {
                tracker.add(&health(1, 1), None, start);
            }
            let mut counts = vec![0; 200];
            let mut now = start;
            let mut largest = 0;
            while now < start + Duration::from_secs(20) {
                let due = tracker.due(now);
                // Once they are spread, no tenth of an interval has more than a third of them.
                if now > start + Duration::from_secs(2) {
                    largest = largest.max(due.len());
                }
                for id in due {
                    counts[id] += 1;
                    tracker.record(id, true, now);
                }
                now += Duration::from_millis(100);
            }
            prop_assert!(largest < 67, "{largest}");
            prop_assert!(counts.iter().all(|count| (18..=24).contains(count)), "{counts:?}");
        }
    }
}
