//! Arbitrary text as the file of a prompt set: loaded, or rejected with a reason.

#![no_main]

use bsap::prompts::PromptSet;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    std::io::Write::write_all(&mut file, data).expect("written");
    match PromptSet::load_builtin_or_file(&file.path().display().to_string()) {
        Ok(set) => {
            set.validate().expect("a loaded set is valid");
            assert_eq!(set.fingerprint().len(), 64);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
