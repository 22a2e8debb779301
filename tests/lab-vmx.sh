# shellcheck shell=bash
# What tests/lab does for --vmx: Debian's Bochs emulates an Intel processor with VMX and EPT. Sourced, never run.
# There is no 9p in there: the files that the job needs go along in an archive, with the libraries they want.
# The sourcing script has set here, job, kernel, initramfs, memory_mib, limit_seconds, taken.
# shellcheck disable=SC2154

# As /bin in there is busybox's, a job that wants bash or perl names it by -f.
# shellcheck disable=SC2034 # the sourcing script needs them
vmx_needs="bochs:bochs /usr/share/bochs/BIOS-bochs-latest:bochsbios /usr/share/bochs/VGABIOS-lgpl-latest:vgabios
    /usr/share/doc/bochs-term:bochs-term script:bsdutils grub-mkrescue:grub-common
    /usr/lib/grub/i386-pc/moddep.lst:grub-pc-bin xorriso:xorriso mformat:mtools cpio:cpio depmod:kmod xz:xz-utils"

# vmx_initramfs KERNEL FILE: busybox, lab-init-vmx, and KVM's modules.
vmx_initramfs() {
    local root=$2.root module
    new_root "$root" "$here/lab-init-vmx"
    for module in irqbypass kvm kvm-intel; do
        find "$1/lib/modules/" -name "$module.ko.xz" -exec xz -dc {} + >"$root/modules/$module.ko"
        [ -s "$root/modules/$module.ko" ] || fail "the lab's kernel has no module $module.ko.xz"
    done
    pack_root "$root" "$2"
}

# vmx_take FILE...: copies them to the same paths below $job/root, with the libraries they want.
vmx_take() {
    local file
    for file in "$@"; do
        file=$(realpath -s "$file")
        [ -e "$job/root$file" ] || cp -rL --parents "$file" "$job/root"
        # What is no program, or wants no libraries, has none.
        { ldd "$file" 2>/dev/null | grep -o '/[^ ]*' || true; } | while read -r file; do
            [ -e "$job/root$file" ] || cp -L --parents "$file" "$job/root"
        done
    done
}

# vmx_disc WORD...: makes $job/disc.iso, which boots the job. Of its words those that are files go along.
vmx_disc() {
    local word
    mkdir -p "$job/root$PWD" "$job/disc/boot/grub"
    for word in "$@"; do
        # A directory is taken if it was asked for by -f only.
        if [ -f "$word" ] || [[ -d $word && " ${taken[*]-} " == *" $word "* ]]; then vmx_take "$word"; fi
    done
    mv "$job/job" "$job/root/job"
    (cd "$job/root" && find . | cpio -o -H newc --quiet) >"$job/disc/job"
    cp "$kernel/vmlinuz" "$initramfs" "$job/disc/"
    cat >"$job/disc/boot/grub/grub.cfg" <<GRUB
linux /vmlinuz console=ttyS0 panic=-1 quiet mitigations=off nokaslr tsc=reliable
initrd /${initramfs##*/} /job
boot
GRUB
    grub-mkrescue -o "$job/disc.iso" "$job/disc" >"$job/grub" 2>&1 || fail "grub-mkrescue: $(tail -n 3 "$job/grub")"
    rm -r "$job/disc" "$job/root"
}

# run_vmx: starts the emulator, in the background.
run_vmx() {
    cat >"$job/bochsrc" <<RC
cpu: model=corei7_skylake_x, count=1, ips=80000000, ignore_bad_msrs=1
memory: guest=$memory_mib, host=$memory_mib
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=$job/disc.iso, status=inserted
boot: cdrom
clock: sync=none, time0=$(date +%s)
com1: enabled=1, mode=file, dev=$job/serial
com2: enabled=1, mode=file, dev=$job/stdout
com3: enabled=1, mode=file, dev=$job/stderr
com4: enabled=1, mode=file, dev=$job/status
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
log: $job/bochs.log
display_library: term
RC
    # Debian's Bochs stops in its debugger first, and draws on a terminal.
    echo c >"$job/debugger"
    TERM=xterm setpriv --pdeathsig TERM timeout -k 5 "$limit_seconds" setpriv --pdeathsig KILL \
        script -qec "exec bochs -q -f $job/bochsrc -rc $job/debugger" /dev/null </dev/null >"$job/screen" 2>&1 &
}
