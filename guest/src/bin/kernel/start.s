# From the VMM's hands to ring 3, and from an exception back to it.
#
# Ring 0 is kept to a few dozen simple instructions, none of them SSE: where KVM has neither VMX nor
# SVM it emulates ring 0 one instruction at a time, and does not know them all. Whatever can wait is
# done in ring 3.
#
# Entered in 64-bit mode with interrupts off, flat segments and the first gigabyte mapped to itself,
# by all processors at once. rsi: the Linux boot_params. edi: the number of the processor.

.set KERNEL_CODE, 0x08
.set USER_DATA, 0x23
.set USER_CODE, 0x2b
.set TASK, 0x30

# Ports a program in ring 3 may use: those below this number.
.set PORTS, 0x800

.set MAX_PROCESSORS, 32
# How a processor waits for its stack: this port, so many milliseconds.
.set IDLE_PORT, 0x604
.set STACK_MS, 20
.set STACK_SHIFT, 14

.section .text.start, "ax"
.global _start
_start:
    cli
    cld
    # Room of its own for the frame that leads to ring 3.
    mov ecx, edi
    shl ecx, 6
    lea rsp, [rip + entry_frames + 64]
    add rsp, rcx

    # All processors have the same task state, each by a descriptor of its own, for a processor marks
    # its own as busy. The base lies scattered in it. The image ends below 16 MiB.
    lea rax, [rip + task_state]
    lea rbx, [rip + task_descriptors]
    shr ecx, 2
    add rbx, rcx
    mov word ptr [rbx + 2], ax
    shr rax, 16
    mov byte ptr [rbx + 4], al

    # SSE, and no protection that would keep ring 0 from the pages of ring 3.
    mov eax, 0x620                  # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, rax
    mov eax, 0x80000033             # PG, NE, ET, MP, PE
    mov cr0, rax

    lea rax, [rip + page_map]
    mov cr3, rax
    lgdt [rip + global_table]
    lidt [rip + interrupt_table]
    lea eax, [rcx + TASK]
    ltr ax

    push USER_DATA
    lea rax, [rip + stack_top]
    push rax
    push 2                          # no interrupts, no I/O privilege: ports go by the bitmap below
    push USER_CODE
    lea rax, [rip + ring3]
    push rax
    iretq

.text
ring3:
    mov eax, USER_DATA
    mov ds, eax
    mov es, eax
    test edi, edi
    jnz other_processor

    lea rdi, [rip + __bss_start]
    lea rcx, [rip + __bss_end]
    sub rcx, rdi
    xor eax, eax
    rep stosb

    # 32 gates, one to each of the stubs, which lie 16 bytes apart.
    lea rdi, [rip + gates]
    lea rax, [rip + stubs]
    mov ecx, 32
1:
    mov rdx, rax
    mov word ptr [rdi], dx
    mov dword ptr [rdi + 2], 0xee000000 + KERNEL_CODE      # ring 3 may use int3
    shr rdx, 16
    mov word ptr [rdi + 6], dx
    mov qword ptr [rdi + 8], 0
    add rdi, 16
    add rax, 16
    dec ecx
    jnz 1b

    xor ebp, ebp
    mov rdi, rsi
    call kernel_main
    ud2

# Every processor but the first: it waits until the first has a stack for it.
other_processor:
    mov rsp, qword ptr [rip + processor_stacks]
    test rsp, rsp
    jnz 1f
    mov edx, IDLE_PORT
    mov eax, STACK_MS
    out dx, eax
    jmp other_processor
1:
    mov eax, edi
    shl eax, STACK_SHIFT
    add rsp, rax
    xor ebp, ebp
    call processor_main
    ud2

# Exceptions. Each stub completes the frame to: vector, error code, rip, cs, rflags, rsp, ss.
.balign 16
stubs:
.set vector, 0
.rept 32
    .balign 16
    .if vector == 8 || vector == 10 || vector == 11 || vector == 12 || vector == 13 || vector == 14 || vector == 17 || vector == 21 || vector == 29 || vector == 30
    .else
    push 0
    .endif
    push vector
    jmp trap
    .set vector, vector + 1
.endr

# Notes what happened and goes to ring 3 to tell it: there is no way back to what was interrupted.
.balign 16
trap:
    mov rdi, qword ptr [rsp]
    mov rsi, qword ptr [rsp + 8]
    mov rdx, qword ptr [rsp + 16]
    mov r8, qword ptr [rsp + 40]
    mov rcx, cr2
    push USER_DATA
    lea rax, [rip + stack_top]
    push rax
    push 2
    push USER_CODE
    lea rax, [rip + trap_ring3]
    push rax
    iretq

trap_ring3:
    xor ebp, ebp
    call kernel_trap
    ud2

.section .data.tables, "aw"
# The first gigabyte, for ring 3, in pages of 2 MiB. kernel_main adds what lies above.
.balign 4096
page_map:
    .quad page_directory_pointers + 7
    .fill 511, 8, 0
.global page_directory_pointers
page_directory_pointers:
    .quad page_directory + 7
    .fill 511, 8, 0
page_directory:
.set at, 0
.rept 512
    .quad at + 0x87
    .set at, at + 0x200000
.endr
gates:
    .fill 512, 1, 0

.balign 16
task_state:
    .long 0
    .quad trap_stack_top            # rsp0
    .fill 88, 1, 0
    .word 0
    .word task_ports - task_state
task_ports:
    .fill PORTS / 8, 1, 0
    .byte 0xff                      # the processor reads one byte beyond
task_end:

.balign 16
descriptors:
    .quad 0
    .quad 0x00af9b000000ffff        # 0x08 ring 0 code
    .quad 0x00cf93000000ffff        # 0x10 ring 0 data
    .quad 0                         # 0x18
    .quad 0x00cff3000000ffff        # 0x20 ring 3 data
    .quad 0x00affb000000ffff        # 0x28 ring 3 code
task_descriptors:                   # from 0x30 on, one for each processor
.rept MAX_PROCESSORS
    .word task_end - task_state - 1
    .word 0
    .byte 0
    .byte 0x89
    .word 0
    .quad 0
.endr
descriptors_end:

.balign 8
global_table:
    .word descriptors_end - descriptors - 1
    .quad descriptors
interrupt_table:
    .word 511
    .quad gates

.section .stack, "aw", @nobits
.balign 4096
    .fill 4096, 1, 0
trap_stack_top:
    .fill 65536, 1, 0
stack_top:
entry_frames:
    .fill 64 * MAX_PROCESSORS, 1, 0
.text
