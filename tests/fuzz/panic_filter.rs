//! The fuzzer's panic hook ends the run. Some panics of libraries are caught by bsap and must not.

/// Makes the panic hook ignore panics in the sources of the package `package`; all others still end
/// the run.
pub fn ignore_panics_of(package: &'static str) {
    let abort_hook = std::panic::take_hook();
    let source_path = format!("/{package}-");
    std::panic::set_hook(Box::new(move |info| {
        if !info.location().is_some_and(|location| location.file().contains(&source_path)) {
            abort_hook(info);
        }
    }));
}
