//! The progress bar: rate and time left on a terminal, nothing elsewhere.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use horcrux::image::{Phase, Progress};
use indicatif::{ProgressBar, ProgressStyle};

const EVERY: Duration = Duration::from_millis(100);

/// A bar that follows a [`Progress`] until it is dropped.
pub struct Bar {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Bar {
    /// Follows `progress` on standard error, if that is a terminal.
    pub fn follow(progress: Arc<Progress>) -> Bar {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::io::stderr().is_terminal().then(|| {
            std::thread::spawn(move || {
                let bar = ProgressBar::new_spinner();
                let mut reading = false;
                while !stopped.load(Ordering::Relaxed) {
                    if progress.phase() == Phase::Read && !reading {
                        reading = true;
                        bar.reset();
                        bar.set_style(reading_style());
                    }
                    show(&bar, &progress);
                    std::thread::sleep(EVERY);
                }
                bar.finish_and_clear();
            })
        });
        Bar { stop, thread }
    }
}

fn reading_style() -> ProgressStyle {
    ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta} left, {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn show(bar: &ProgressBar, progress: &Progress) {
    match progress.phase() {
        Phase::Scan => bar.set_message(format!("looking: {} entries", progress.entries_found())),
        Phase::Layout => bar.set_message(format!("laying out {} files", progress.files_total())),
        Phase::Read => {
            bar.set_length(progress.bytes_total().0);
            bar.set_position(progress.bytes_done().0);
            bar.set_message(format!("{}/{} files", progress.files_done(), progress.files_total()));
        }
        Phase::Done => bar.set_message("storing the rest"),
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It only draws; if it panicked there is nothing to save.
            let _ = thread.join();
        }
    }
}
